"""Peak memory of the loss against the number of tokens, by hand and ours, in fresh processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from str_kernels.loss_memory import available_bytes

from ..results import Row, origin
from ..steps.heads import HeadShape
from ..steps.providers import EAGER
from .child import peak_in_child

OURS = "ours (torch)"
TOKENS = (512, 1024, 2048, 4096, 8192)
LONG = 131072

PROTOCOL = (
    "Frozen head, on the CPU, one forward and backward in a fresh process; the process's peak "
    "above what it held before, so above the inputs (hidden states, head, references). The hidden "
    "states' gradient is part of it. By hand where it fits the free memory; predicted is "
    f"{EAGER.bytes_per_logit} bytes a logit."
)


def measure(
    shape: HeadShape,
    tokens: Sequence[int] = TOKENS,
    *,
    long: Sequence[int] = (LONG,),
    ids: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Row]:
    """Measure the loss by hand and ours.

    Args:
        shape: V, D, scale and cap.
        tokens: each N at which both are measured.
        long: each N at which only ours is measured.
        ids: K.
        dtype: of hidden states and head.

    Returns:
        One row for each N, with bytes: `ours`, `gradient` (the part of ours that is the result),
        `eager` (None where not measured) and `eager_predicted`.
    """
    base = origin("cpu", PROTOCOL) | {
        "D": shape.width,
        "V": shape.vocab,
        "K": ids,
        "dtype": str(dtype).removeprefix("torch."),
    }
    rows = []
    for count in sorted({*tokens, *long}):
        predicted = EAGER.bytes_per_logit * count * shape.vocab
        fits = count in tokens and predicted < available_bytes()
        eager = peak_in_child(EAGER.name, shape, count, ids, dtype) if fits else None
        ours = peak_in_child(OURS, shape, count, ids, dtype)
        rows.append(
            base
            | {
                "N": count,
                "ours": ours,
                "gradient": count * shape.width * dtype.itemsize,
                "eager": eager,
                "eager_predicted": predicted,
                "ratio": ours / (eager or predicted),
            }
        )
    return rows
