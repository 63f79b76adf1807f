"""The head, and the safety logits as a product of their own in full precision.

Student and reference both go through `project`, on the same rows in the same blocks: equal hidden
states then give bitwise equal safety logits, and the penalty is exactly 0.0 before the first step.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .contracts import accumulation_dtype

_ROWS_PER_BLOCK = 1024  # bounds the float32 copy of the hidden states; fixed, see the module's note


class Head(NamedTuple):
    """A head, raw logits u = h W^T + bias + t B^T; the last product is that of a LoRA on it."""

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

    Returns:
        (N, K) float32 (float64 for float64 inputs), logits.

    Notes:
        Products are made in float32 whatever the inputs' dtype: a bfloat16 logit of 20 has steps
        of 0.125, more than the drift that the penalty has to see. Under autocast the operands are
        first rounded to autocast's dtype, as the head itself would do.
    """
    head = _rows_of(Head(linear_weight, linear_bias, *(low_rank or ())), safety_ids)
    hidden, head = cast_for_autocast(hidden, head)  # of K rows, not of the whole head
    return _project_rows(hidden, head, logit_scale, softcap)


def project_head(
    hidden: Tensor, head: Head, safety_ids: Tensor, logit_scale: float, softcap: float | None
) -> Tensor:  # (N, K)
    """Compute `project` of operands that are already what autocast makes of them."""
    return _project_rows(hidden, _rows_of(head, safety_ids), logit_scale, softcap)


def _rows_of(head: Head, ids: Tensor) -> Head:
    weight, bias, t, b = head
    bias, b = (None if x is None else x.index_select(0, ids) for x in (bias, b))
    return Head(weight.index_select(0, ids), bias, t, b)


def _project_rows(
    hidden: Tensor, head: Head, logit_scale: float, softcap: float | None
) -> Tensor:  # (N, K)
    dtype = accumulation_dtype(hidden.dtype)
    if not head.weight.shape[0]:
        return hidden.new_empty((hidden.shape[0], 0), dtype=dtype)
    kind = hidden.device.type
    with torch.autocast(kind, enabled=False) if _has_autocast(kind) else nullcontext():
        weight = head.weight.to(dtype)
        bias = None if head.bias is None else head.bias.to(dtype)
        blocks = [
            torch.nn.functional.linear(block.to(dtype), weight, bias)
            for block in hidden.split(_ROWS_PER_BLOCK)
        ]
        if head.t is not None and head.b is not None:
            b = head.b.to(dtype).t()
            blocks = [
                torch.addmm(block, t.to(dtype), b)
                for block, t in zip(blocks, head.t.split(_ROWS_PER_BLOCK), strict=True)
            ]
        return scale_and_cap(torch.cat(blocks), logit_scale, softcap)


def scale_and_cap(raw: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """Apply z = t tanh(c u / t) to raw head outputs u; no cap when softcap is None or 0."""
    scaled = raw * logit_scale if logit_scale != 1.0 else raw
    return torch.tanh(scaled / softcap) * softcap if softcap else scaled


def _has_autocast(device_type: str) -> bool:
    """Say whether autocast knows the device: "meta", where shapes are tried out, it refuses."""
    return torch.amp.is_autocast_available(device_type)


def cast_for_autocast(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    """Round the operands to autocast's dtype where autocast is on; else leave them as they are.

    Inside a custom op autocast would round an operand behind our back, so it is off there and the
    rounding happens here, in view of autograd.
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
