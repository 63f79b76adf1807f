"""The head, and `project`, which computes the safety logits separately in float32.

Student and reference both go through `project`, on the same rows in the same blocks: equal hidden
states then give bitwise equal safety logits, and the penalty is exactly 0.0 before the first step.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .contracts import accumulation_dtype
from .parallel import VocabShard, local_rows, same_on_ranks, sum_over_ranks

_ROWS_PER_BLOCK = 1024  # bounds the float32 copy of the hidden states; fixed, see the docstring


class Head(NamedTuple):
    """A head with raw logits u = h W^T + bias + t B^T; t B^T is a LoRA on it."""

    weight: Tensor  # (V, D) W
    bias: Tensor | None = None  # (V,)
    t: Tensor | None = None  # (N, r) the hidden states after the adapter's first matrix, scaled
    b: Tensor | None = None  # (V, r) B, the adapter's second matrix


def project(
    hidden: Tensor,  # (N, D)
    linear_weight: Tensor,  # (V, D)
    safety_ids: Tensor,  # (K,)
    linear_bias: Tensor | None = None,  # (V,)
    *,
    low_rank: tuple[Tensor, Tensor] | None = None,  # (N, r), (V, r)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    process_group: Any = None,
) -> Tensor:  # (N, K)
    """Compute the logits of the safety ids alone, without the rest of the vocabulary.

        z_S = cap(logit_scale * (hidden W[S]^T + b[S] + t B[S]^T))
        cap(x) = softcap tanh(x / softcap)

    Differentiable in `hidden`, `linear_weight`, `linear_bias` and `low_rank`.

    Args:
        hidden: (N, D) floating point, the state that the head multiplies.
        linear_weight: (V, D), the head.
        safety_ids: (K,) int64, each in [0, V).
        linear_bias: (V,) or None.
        low_rank: (t, B) of a LoRA on the head, as in `safety_linear_cross_entropy`, or None.
        logit_scale: factor on the head's output.
        softcap: cap in logits, or None for none.
        process_group: as in `safety_linear_cross_entropy`.

    Returns:
        (N, K) float32 (float64 for float64 inputs), logits.

    Raises:
        ValueError: with a `process_group` and on a CPU, an id is outside the vocabulary.

    Notes:
        Products are computed in float32 for every input dtype: a bfloat16 logit of 20 has steps
        of 0.125, more than the drift that the penalty should see. Under autocast the operands are
        first rounded to autocast's dtype, as for the head itself.
    """
    head, shard = local_head(Head(linear_weight, linear_bias, *(low_rank or ())), process_group)
    if shard is not None and safety_ids.device.type == "cpu" and safety_ids.numel():
        least, most = int(safety_ids.min()), int(safety_ids.max())
        if least < 0 or most >= shard.vocab:  # no rank has it, and its logit would be 0
            raise ValueError(
                f"`safety_ids` must be in [0, {shard.vocab}); got {least if least < 0 else most}"
            )
    head = _rows_of(head, safety_ids, shard)
    hidden, head = cast_for_autocast(hidden, head)  # of K rows, not of the whole head
    return _project_rows(hidden, head, safety_ids, logit_scale, softcap, shard)


def project_head(
    hidden: Tensor,
    head: Head,
    safety_ids: Tensor,
    logit_scale: float,
    softcap: float | None,
    shard: VocabShard | None = None,
) -> Tensor:  # (N, K)
    """Compute `project` on operands that are already in autocast's dtype."""
    rows = _rows_of(head, safety_ids, shard)
    return _project_rows(hidden, rows, safety_ids, logit_scale, softcap, shard)


def local_head(head: Head, process_group: Any) -> tuple[Head, VocabShard | None]:
    """Take this rank's rows of a head; `local_rows` says what a process group is."""
    weight, bias, t, b = head
    parts = {"linear_weight": weight, "linear_bias": bias, "low_rank[1]": b}
    (first, bias, b), shard = local_rows(parts, process_group)
    return Head(weight if first is None else first, bias, t, b), shard


def _rows_of(head: Head, ids: Tensor, shard: VocabShard | None) -> Head:
    """Return the ids' rows of the head; for ids of other ranks, arbitrary rows."""
    if shard is not None and not shard.width:
        # this rank has no rows; a product keeps the weight in the autograd graph
        one = ids.new_zeros(len(ids), 0, dtype=head.weight.dtype)
        bias = None if head.bias is None else one @ head.bias
        return Head(one @ head.weight, bias, head.t, None if head.b is None else one @ head.b)
    column = ids if shard is None else shard.columns(ids).clamp(max=shard.width - 1)
    weight, bias, t, b = head
    bias, b = (None if x is None else x.index_select(0, column) for x in (bias, b))
    return Head(weight.index_select(0, column), bias, t, b)


def _project_rows(
    hidden: Tensor,
    head: Head,  # of the K rows
    ids: Tensor,  # (K,)
    logit_scale: float,
    softcap: float | None,
    shard: VocabShard | None,
) -> Tensor:  # (N, K)
    dtype = accumulation_dtype(hidden.dtype)
    if not head.weight.shape[0]:
        return hidden.new_empty((hidden.shape[0], 0), dtype=dtype)
    kind = hidden.device.type
    with torch.autocast(kind, enabled=False) if _has_autocast(kind) else nullcontext():
        weight = head.weight.to(dtype)
        bias = None if head.bias is None else head.bias.to(dtype)
        blocks = [
            torch.nn.functional.linear(same_on_ranks(block.to(dtype), shard), weight, bias)
            for block in hidden.split(_ROWS_PER_BLOCK)
        ]
        if head.t is not None and head.b is not None:
            b = head.b.to(dtype).t()
            blocks = [
                torch.addmm(block, same_on_ranks(t.to(dtype), shard), b)
                for block, t in zip(blocks, head.t.split(_ROWS_PER_BLOCK), strict=True)
            ]
        raw = torch.cat(blocks)
        if shard is not None:  # one rank has each id, and the others add 0: nothing is rounded
            raw = sum_over_ranks(torch.where(shard.columns(ids) < shard.width, raw, 0.0), shard)
        return scale_and_cap(raw, logit_scale, softcap)


def scale_and_cap(raw: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """Apply z = t tanh(c u / t) to raw head outputs u; no cap when softcap is None or 0."""
    scaled = raw * logit_scale if logit_scale != 1.0 else raw
    return torch.tanh(scaled / softcap) * softcap if softcap else scaled


def _has_autocast(device_type: str) -> bool:
    """Return whether autocast supports the device; it does not support "meta"."""
    return torch.amp.is_autocast_available(device_type)


def cast_for_autocast(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    """Round the operands to autocast's dtype if autocast is on; else return them unchanged.

    The rounding happens here, where autograd sees it; inside the custom ops autocast is off.
    """
    device_type = hidden.device.type
    if not _has_autocast(device_type) or not torch.is_autocast_enabled(device_type):
        return hidden, head
    if hidden.dtype == torch.float64:
        return hidden, head
    dtype = torch.get_autocast_dtype(device_type)
    weight, *rest = head
    return hidden.to(dtype), Head(
        weight.to(dtype), *(x if x is None else x.to(dtype) for x in rest)
    )
