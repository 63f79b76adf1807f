"""The torch row step, with the part that works on all V columns compiled by torch.compile.

On a CPU it needs a C++ compiler and some seconds on first use, so it is opt-in
(backend="compiled"). The columns of the target and the safety ids are computed in `rows_torch`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..contracts import RowOptions, RowTerms, accumulation_dtype
from ..projection import scale_and_cap
from .rows_torch import Scratch, Soft, Wide, row_step_torch

_BLOCK_BYTES = 8 << 20  # larger than in rows_torch, because a call of compiled code costs more


def row_step_compiled(*args: Any, **kwargs: Any) -> RowTerms:
    """Compute terms and gradient of every row; `contracts.RowStep` documents the arguments."""
    return row_step_torch(*args, **kwargs, block_step=_block_step, block_bytes=_BLOCK_BYTES)


def _block_step(
    logits: Tensor,
    scratch: Scratch,
    wide: Wide,
    options: RowOptions,
    *,
    norm_known: bool,
    soft: Soft | None,
    grad: Tensor | None,
) -> None:
    dtype = wide.top.dtype
    in_place = grad is not None and grad.data_ptr() == logits.data_ptr()
    with torch.no_grad():
        z, scale = logits, options.logit_scale
        if options.softcap:
            # once, and kept in cache: each loop below would otherwise compute tanh again
            z = scratch.like(logits, "z", dtype)
            _capped(options.logit_scale, options.softcap)(logits, z)
            scale = 1.0
        # Preallocated, because inductor would allocate and clear memory for exp in every call.
        e = None if norm_known or soft is None else scratch.like(logits, "e", dtype)
        if not norm_known:
            find = _terms(scale, e is not None, wide.mean.dim() == 1, wide.right.dim() == 1)
            for mine, value in zip(wide[1:], find(z, wide.target, e), strict=True):
                if mine.dim() == 1:
                    mine.copy_(value)
        if soft is not None and grad is not None:
            write = _gradient(
                e is not None,
                soft.per_lse is not None,
                soft.flat is not None,
                scale,
                options.logit_scale,
                options.softcap,
            )
            nothing = wide.top.new_empty(0)
            per_row = (nothing if x is None else x for x in soft)
            # passed once, because the compiler would copy a tensor that is passed twice
            target = None if in_place and not options.softcap else grad
            write(z, e, wide.top, wide.log_total, *per_row, target)


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    # Dynamo gives up after eight compilations of one code object, so each variant gets its own.
    function.__code__ = function.__code__.replace()
    return torch.compile(function, dynamic=True)


def _tanh(x: Tensor) -> Tensor:
    """Compute float32 tanh by exp, as the Triton kernel does, in a third of the time of tanh."""
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
def _terms(
    scale: float, keeps_exp: bool, wants_mean: bool, wants_metrics: bool
) -> Callable[..., tuple[Tensor, ...]]:
    """Compile one variant; its sizes stay symbolic, so a last, shorter block does not recompile."""

    def terms(logits: Tensor, target: Tensor, exp: Tensor | None) -> tuple[Tensor, ...]:
        z = scale_and_cap(logits.to(accumulation_dtype(logits.dtype)), scale, None)
        top = z.amax(dim=1)
        shifted = z - top.unsqueeze(1)
        e = shifted.exp()
        if keeps_exp and exp is not None:
            exp.copy_(e)
        total = e.sum(dim=1)
        log_total = total.log()
        mean = right = entropy = top
        if wants_mean:
            mean = shifted.mean(dim=1)
        if wants_metrics:
            # the first of equal maxima is the prediction; argmax would not be vectorised
            column = torch.arange(z.shape[1], dtype=torch.int32, device=z.device)
            is_top = z == top.unsqueeze(1)
            right = torch.where(is_top, column, z.shape[1]).amin(dim=1) == target
            # 0 (-inf) is 0: a masked column adds nothing to the entropy
            products = torch.where(e > 0, e * shifted, 0.0)
            entropy = log_total - products.sum(dim=1) / total
        return top, log_total, mean, right, entropy

    return _compile(terms)


@functools.cache
def _gradient(
    has_exp: bool,
    has_per_lse: bool,
    has_flat: bool,
    scale: float,
    logit_scale: float,
    softcap: float,
) -> Callable[..., None]:
    def gradient(
        logits: Tensor,
        exp: Tensor | None,
        top: Tensor,
        log_total: Tensor,
        takes: Tensor,
        at_0: Tensor,
        per_lse: Tensor,
        flat: Tensor,
        grad: Tensor | None,
    ) -> None:
        z = scale_and_cap(logits.to(top.dtype), scale, None)
        factor = at_0
        if has_per_lse:
            factor = factor + torch.where(per_lse != 0, per_lse * (top + log_total), 0.0)
        if has_exp and exp is not None:
            dz = exp * (factor * (-log_total).exp()).unsqueeze(1)
        else:
            dz = ((z - top.unsqueeze(1)) - log_total.unsqueeze(1)).exp() * factor.unsqueeze(1)
        if has_flat:
            dz = dz - flat.unsqueeze(1)
        if softcap:
            dz = dz * (logit_scale * (1.0 - (z / softcap).square()))
        elif logit_scale != 1.0:
            dz = dz * logit_scale
        dz = torch.where(takes.unsqueeze(1), dz, 0.0)
        (logits if grad is None else grad).copy_(dz)

    return _compile(gradient)
