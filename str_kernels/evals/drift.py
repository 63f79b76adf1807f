"""How far the safety logits of a model moved from those of its reference."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..op import check_tensor


class DriftStatistics(NamedTuple):
    """The size of a drift, over rows and safety ids alike.

    Args:
        rows: rows seen.
        rms: root of the mean square, in logits. Its square is the "mse" penalty averaged over rows.
        mean_abs: mean absolute value, in logits.
        max_abs: largest absolute value, in logits.
    """

    rows: int
    rms: float
    mean_abs: float
    max_abs: float


def drift_statistics(
    pairs: Iterable[tuple[Tensor, Tensor]],  # of (n, K), (n, K); n may differ, K may not
) -> DriftStatistics:
    """Summarise the drift of the safety logits over any number of batches.

    With z the safety logits, r those of the reference, d = z - r, and M the number of rows:

        rms      = sqrt(sum(d**2) / (M * K))
        mean_abs = sum(|d|) / (M * K)
        max_abs  = max(|d|)

    Args:
        pairs: batches of (safety_logits, ref_safety_logits), each (n, K), any float dtype, on any
            device; column k is the same safety id throughout. A batch of no rows adds nothing.

    Returns:
        DriftStatistics: a row count and three Python floats, in logits.

    Raises:
        TypeError: a member of a pair is not a floating-point tensor.
        ValueError: a shape is not (n, K), the two shapes of a pair differ, K changes between pairs,
            or there are no rows.

    Notes:
        Differences and sums are float64 on the CPU: logits in bfloat16 are subtracted exactly, and
        the result does not depend on how the rows are batched beyond the rounding of float64. A
        NaN or an infinity anywhere shows in the result. Waits for the GPU at every batch.

    References:
        The quantity penalised: Bach and Tran 2026, arXiv:2604.17210.

    Examples:
        >>> import torch
        >>> ref = torch.zeros(2, 2)
        >>> drift_statistics([(torch.tensor([[3.0, -4.0], [0.0, 0.0]]), ref)])
        DriftStatistics(rows=2, rms=2.5, mean_abs=1.75, max_abs=4.0)
    """
    rows, ids = 0, None
    squares, absolutes, largest = 0.0, 0.0, 0.0
    for safety_logits, ref_safety_logits in pairs:
        z = _as_float64("safety_logits", safety_logits, "K" if ids is None else ids)
        ids = z.shape[1]
        r = _as_float64("ref_safety_logits", ref_safety_logits, ids)
        if r.shape != z.shape:
            raise ValueError(
                f"`ref_safety_logits` must have the shape of `safety_logits`, {tuple(z.shape)}; "
                f"got {tuple(r.shape)}"
            )
        if z.numel() == 0:
            continue
        distance = (z - r).abs()
        rows += z.shape[0]
        squares += distance.square().sum().item()
        absolutes += distance.sum().item()
        batch_largest = distance.max().item()
        # Python's max() returns its first argument if either is NaN
        largest = batch_largest if math.isnan(batch_largest) else max(largest, batch_largest)
    if rows == 0 or ids is None:
        raise ValueError("`pairs` must hold at least one row and one safety id; got none")
    entries = rows * ids
    return DriftStatistics(rows, math.sqrt(squares / entries), absolutes / entries, largest)


def _as_float64(name: str, value: object, ids: int | str) -> Tensor:  # (n, K)
    tensor = check_tensor(name, value, ("n", ids))
    if not tensor.is_floating_point():
        raise TypeError(f"`{name}` must be a floating-point tensor; got {tensor.dtype}")
    return tensor.detach().to("cpu", torch.float64)
