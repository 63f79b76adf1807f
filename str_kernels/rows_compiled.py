"""The torch row step with its width-V part compiled by torch.compile into three fused loops.

On a CPU it needs a C++ compiler and some seconds on first use, so it is asked for by name
(backend="compiled"). The columns of the target and the safety ids stay in `rows_torch`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .contracts import RowOptions, RowTerms
from .projection import scale_and_cap
from .rows_torch import Soft, Wide, row_step_torch


def row_step_compiled(*args: Any, **kwargs: Any) -> RowTerms:
    """Compute terms and gradient of every row; `contracts.RowStep` says what the arguments are."""
    return row_step_torch(*args, **kwargs, wide_step=_wide_step)


def _wide_step(
    logits: Tensor,
    norm: Tensor,
    options: RowOptions,
    *,
    norm_known: bool,
    soft: Soft | None,
    grad: Tensor | None,
) -> Wide:
    compiled = _compiled(
        norm_known,
        soft is not None,
        soft is not None and soft.per_lse is not None,
        soft is not None and soft.flat is not None,
        options.logit_scale,
        options.softcap,
        options.label_smoothing > 0 and not norm_known,
        options.metrics and not norm_known,
    )
    in_place = grad is not None and grad.data_ptr() == logits.data_ptr()
    nothing = norm.new_empty(0)
    soft = soft or Soft(nothing, None, None)
    per_row = (
        soft.at_0,
        nothing if soft.per_lse is None else soft.per_lse,
        nothing if soft.flat is None else soft.flat,
    )
    with torch.no_grad():
        return compiled(logits, norm, *per_row, None if in_place else grad)


@functools.cache
def _compiled(
    norm_known: bool,
    wants_grad: bool,
    has_per_lse: bool,
    has_flat: bool,
    logit_scale: float,
    softcap: float,
    wants_mean: bool,
    wants_metrics: bool,
) -> Callable[..., Wide]:
    """Compile one variant; its sizes stay symbolic, so a last, shorter chunk does not recompile."""

    def wide(
        logits: Tensor,
        norm: Tensor,
        at_0: Tensor,
        per_lse: Tensor,
        flat: Tensor,
        grad: Tensor | None,
    ) -> Wide:
        z = scale_and_cap(logits.to(norm.dtype), logit_scale, softcap)
        empty = norm.new_empty(0)
        mean, best, entropy = empty, empty.to(torch.int64), empty
        if not norm_known:
            top = z.amax(dim=1)
            shifted = z - top.unsqueeze(1)
            e = shifted.exp()
            total = e.sum(dim=1)
            norm.copy_(torch.stack((top, total.log())))
            if wants_mean:
                mean = shifted.mean(dim=1)
            if wants_metrics:
                best = z.argmax(dim=1)
                # 0 (-inf) is 0: a masked column has no part in the entropy
                products = torch.where(e > 0, e * shifted, 0.0)
                entropy = total.log() - products.sum(dim=1) / total
        top, log_total = norm[0], norm[1]
        if wants_grad:
            p = ((z - top.unsqueeze(1)) - log_total.unsqueeze(1)).exp()
            factor = at_0
            if has_per_lse:
                factor = factor + torch.where(per_lse != 0, per_lse * (top + log_total), 0.0)
            dz = factor.unsqueeze(1) * p
            if has_flat:
                dz = dz - flat.unsqueeze(1)
            if softcap:
                dz = dz * (logit_scale * (1.0 - (z / softcap).square()))
            elif logit_scale != 1.0:
                dz = dz * logit_scale
            dz = torch.where((factor != 0).unsqueeze(1), dz, 0.0)
            target = logits if grad is None else grad
            target.copy_(dz)
        return Wide(mean, best, entropy)

    return torch.compile(wide, dynamic=True, fullgraph=True)
