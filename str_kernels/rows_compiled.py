"""The torch row step with its width-V part compiled by torch.compile.

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

_BLOCK_BYTES = 8 << 20  # larger than eager's: a call of compiled code costs as much as some rows do


def row_step_compiled(*args: Any, **kwargs: Any) -> RowTerms:
    """Compute terms and gradient of every row; `contracts.RowStep` says what the arguments are."""
    return row_step_torch(*args, **kwargs, block_step=_block_step, block_bytes=_BLOCK_BYTES)


def _block_step(
    logits: Tensor,
    scratch: Tensor | None,
    wide: Wide,
    options: RowOptions,
    *,
    norm_known: bool,
    soft: Soft | None,
    grad: Tensor | None,
) -> None:
    nothing = wide.top.new_empty(0)
    per_row = [nothing] * 4
    if soft is not None:
        per_row = [nothing if x is None else x for x in soft]
    with torch.no_grad():
        if options.softcap:
            # once, into cache: the loops below would each take the tanh anew
            z = torch.empty_like(logits, dtype=wide.top.dtype) if scratch is None else scratch
            _capped(options.logit_scale, options.softcap)(logits, z)
            logits = z
        elif grad is not None and grad.data_ptr() == logits.data_ptr():
            grad = None
        loops = _loops(
            norm_known,
            soft is not None,
            soft is not None and soft.per_lse is not None,
            soft is not None and soft.flat is not None,
            1.0 if options.softcap else options.logit_scale,
            options.logit_scale,
            options.softcap,
            wide.mean.dim() == 1,
            wide.right.dim() == 1,
        )
        found = loops(logits, wide.target, wide.top, wide.log_total, *per_row, grad)
    if not norm_known:
        for mine, value in zip(wide[1:], found, strict=True):
            if mine.dim() == 1:
                mine.copy_(value)


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    # Dynamo counts compilations by code object and gives up at eight; each variant has its own.
    function.__code__ = function.__code__.replace()
    return torch.compile(function, dynamic=True)


def _tanh(x: Tensor) -> Tensor:
    """Compute float32 tanh from exp, as the Triton kernel does: a third of the time of tanh."""
    a = x.abs()
    e = (-2.0 * a).exp()
    s = x * x
    series = -0.05396825396825397 + s * (0.021869488536155203 - s * 0.008863235529902197)
    near = a * (1.0 + s * (-0.3333333333333333 + s * (0.13333333333333333 + s * series)))
    return torch.where(a < 0.25, near, (1.0 - e) / (1.0 + e)).copysign(x)


@functools.cache
def _capped(logit_scale: float, softcap: float) -> Callable[..., None]:
    def capped(logits: Tensor, out: Tensor) -> None:
        x = logits.to(out.dtype) * (logit_scale / softcap)
        out.copy_(softcap * (_tanh(x) if out.dtype == torch.float32 else x.tanh()))

    return _compile(capped)


@functools.cache
def _loops(
    norm_known: bool,
    wants_grad: bool,
    has_per_lse: bool,
    has_flat: bool,
    scale: float,
    logit_scale: float,
    softcap: float,
    wants_mean: bool,
    wants_metrics: bool,
) -> Callable[..., tuple[Tensor, ...]]:
    """Compile one variant; its sizes stay symbolic, so a last, shorter block does not recompile."""

    def loops(
        logits: Tensor,
        target: Tensor,
        top: Tensor,
        log_total: Tensor,
        takes: Tensor,
        at_0: Tensor,
        per_lse: Tensor,
        flat: Tensor,
        grad: Tensor | None,
    ) -> tuple[Tensor, ...]:
        z = scale_and_cap(logits.to(top.dtype), scale, None)
        mean = right = entropy = top
        of_exp = at_0
        if norm_known:
            e = ((z - top.unsqueeze(1)) - log_total.unsqueeze(1)).exp()
        else:
            top = z.amax(dim=1)
            shifted = z - top.unsqueeze(1)
            e = shifted.exp()
            total = e.sum(dim=1)
            log_total = total.log()
            if wants_mean:
                mean = shifted.mean(dim=1)
            if wants_metrics:
                # of equal maxima the first is the prediction; an argmax would not be vectorised
                column = torch.arange(z.shape[1], dtype=torch.int32, device=z.device)
                is_top = z == top.unsqueeze(1)
                right = torch.where(is_top, column, z.shape[1]).amin(dim=1) == target
                # 0 (-inf) is 0: a masked column has no part in the entropy
                products = torch.where(e > 0, e * shifted, 0.0)
                entropy = log_total - products.sum(dim=1) / total
        if wants_grad:
            if has_per_lse:
                of_exp = of_exp + torch.where(per_lse != 0, per_lse * (top + log_total), 0.0)
            dz = e * (of_exp if norm_known else of_exp / total).unsqueeze(1)
            if has_flat:
                dz = dz - flat.unsqueeze(1)
            if softcap:
                dz = dz * (logit_scale * (1.0 - (z / softcap).square()))
            elif logit_scale != 1.0:
                dz = dz * logit_scale
            dz = torch.where(takes.unsqueeze(1), dz, 0.0)
            (logits if grad is None else grad).copy_(dz)
        return top, log_total, mean, right, entropy

    return _compile(loops)
