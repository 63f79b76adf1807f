"""The row step in plain PyTorch: for CPUs, for float64, and for any device without Triton.

The part of width V works on a few rows at a time in a float32 scratch block that stays in cache (or
on the logits themselves, where they are float32 and owned). So the width-V traffic is one read of
the logits and one write of the gradient per pass, and no tensor of the logits' size exists in
float32. The columns of the target and of the safety ids are made apart, and rounded once.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .contracts import RowOptions, RowTerms, accumulation_dtype
from .penalties import KINDS, ON_LOG_PROBS, subset_of

_SCRATCH_BYTES = {"cpu": 2 << 20}  # about one core's L2; see docs/log.md for the measurement
_SCRATCH_BYTES_ELSEWHERE = 64 << 20  # a device needs many rows at once to be busy


class Soft(NamedTuple):
    """The factors of a row's gradient that hold for all V: (soft p_v - flat) dz/du.

    soft = ce_scale (1 + 2 zeta lse) - (kinds on log-probabilities) the sum of the pulls on S, which
    is linear in lse, too. So soft = at_0 + per_lse * lse, and lse need not be known beforehand.
    """

    at_0: Tensor  # (n,)
    per_lse: Tensor | None  # (n,)
    flat: Tensor | None  # (n,) ce_scale e / V


class Wide(NamedTuple):
    """What the part of width V found on the way, (n,) each; empty where it was not asked for."""

    mean: Tensor  # mean_v (z_v - m), for label smoothing
    best: Tensor  # argmax z
    entropy: Tensor


class WideStep(Protocol):
    """The part of width V: fill `norm`, and write the soft part of the gradient."""

    def __call__(
        self,
        logits: Tensor,
        norm: Tensor,
        options: RowOptions,
        *,
        norm_known: bool,
        soft: Soft | None,
        grad: Tensor | None,
    ) -> Wide:
        """Work on (n, V) logits."""
        ...


def row_step_torch(
    logits: Tensor,  # (n, V)
    target: Tensor,  # (n,)
    safety_ids: Tensor,  # (K,)
    safety_logits: Tensor | None,  # (n, K)
    ref: Tensor,  # (n, K)
    id_weights: Tensor,  # (K,)
    options: RowOptions,
    *,
    norm: Tensor | None = None,  # (2, n)
    ce_scale: Tensor | None = None,  # (n,)
    penalty_scale: Tensor | None = None,  # (n,)
    grad: Tensor | None = None,  # (n, V)
    padded: bool = False,
    wide_step: WideStep | None = None,
) -> RowTerms:
    """Compute terms and gradient of every row; `contracts.RowStep` says what the arguments are."""
    rows, vocab = logits.shape
    dtype = accumulation_dtype(logits.dtype)
    inside = (target >= 0) & (target < vocab)
    ignored = target == options.ignore_index
    column = torch.where(inside, target, 0)
    # Everything that single columns need is read before `grad`, which may be `logits`, is written.
    z_y = _scale_and_cap_(logits.gather(1, column.unsqueeze(1)).squeeze(1).to(dtype), options)
    # Two values of one logit: the row's own, which lse is made of, for the softmax, and the finer
    # one of `project` for the penalty. Mixing them would spoil p_y - 1 where y is a safety id.
    row_safety_logits = _scale_and_cap_(logits.index_select(1, safety_ids).to(dtype), options)
    z_s = row_safety_logits if safety_logits is None else safety_logits

    norm_known = norm is not None
    if norm is None:
        norm = logits.new_empty((2, rows), dtype=dtype)
    soft = None
    if ce_scale is not None and penalty_scale is not None and grad is not None:
        # a label that is no column: the row's gradient is NaN
        ce_scale = torch.where(inside | ignored, ce_scale, torch.nan)
        soft = _soft(ce_scale, penalty_scale, z_s, ref, id_weights, vocab, options)
    wide_step = wide_step or _wide_step
    wide = wide_step(logits, norm, options, norm_known=norm_known, soft=soft, grad=grad)

    top, log_total = norm
    lse = top + log_total
    subset = subset_of(z_s, ref, id_weights, lse, options)
    if norm_known:
        none = top[:0]
        terms = RowTerms(none, none, none, norm, none, none)
    else:
        # (lse - m) - (z_y - m): the small numbers are subtracted, not the large ones
        ce = log_total - (z_y - top)
        if options.label_smoothing > 0:
            e = options.label_smoothing
            ce = (1 - e) * ce + e * (log_total - wide.mean)
        ce = torch.where(ignored, 0.0, torch.where(inside, ce, torch.nan))
        penalty = KINDS[options.kind].phi(subset)
        drift = subset.drift.abs()
        worst = drift.amax(dim=1) if drift.shape[1] else top.new_zeros(rows)
        right = (wide.best == target).to(dtype) if options.metrics else top[:0]
        terms = RowTerms(ce, penalty, worst, norm, right, wide.entropy)

    if soft is not None and grad is not None and ce_scale is not None and penalty_scale is not None:
        # These columns hold more than softmax: each is computed whole, then rounded once.
        # Adding to the rounded softmax would lose most bits where p_y is near 1. (By index_put_:
        # scatter_ on a CPU allocates twice the size of `grad`.)
        row = torch.arange(rows, device=grad.device)
        p_y = torch.exp((z_y - top) - log_total)
        grad[row, column] = _column(p_y, 1.0, z_y, soft, ce_scale, lse, options).to(grad.dtype)
        if safety_ids.shape[0]:
            p_s = torch.exp((row_safety_logits - top.unsqueeze(1)) - log_total.unsqueeze(1))
            is_target = (safety_ids == target.unsqueeze(1)).to(dtype)
            on_ids = _column(p_s, is_target, row_safety_logits, soft, ce_scale, lse, options)
            pull = _where_nonzero(penalty_scale.unsqueeze(1), KINDS[options.kind].slope(subset))
            on_ids += pull * _slope(z_s, options)
            grad[row.unsqueeze(1), safety_ids] = on_ids.to(grad.dtype)
    return terms


def _soft(
    ce_scale: Tensor,
    penalty_scale: Tensor,
    z_s: Tensor,
    ref: Tensor,
    id_weights: Tensor,
    vocab: int,
    options: RowOptions,
) -> Soft:
    at_0, per_lse, flat = ce_scale, None, None
    if options.z_loss_weight > 0:
        per_lse = 2 * options.z_loss_weight * ce_scale
    if options.kind in ON_LOG_PROBS and id_weights.shape[0]:
        # minus the sum over k of penalty_scale * 2/K a_k (z_S_k - r_k - lse)
        share = penalty_scale * (2.0 / id_weights.shape[0])
        at_0 = at_0 - _where_nonzero(share, (id_weights * (z_s - ref)).sum(dim=1))
        per_lse = share * id_weights.sum() + (0.0 if per_lse is None else per_lse)
    if options.label_smoothing > 0:
        flat = ce_scale * (options.label_smoothing / vocab)
    return Soft(at_0, per_lse, flat)


def _column(
    p: Tensor,  # (n,) or (n, K)
    is_target: Tensor | float,
    z: Tensor,
    soft: Soft,
    ce_scale: Tensor,
    lse: Tensor,
    options: RowOptions,
) -> Tensor:
    """Return single columns of the gradient without the penalty's pull, unrounded."""

    def along(x: Tensor) -> Tensor:
        return x if p.dim() == 1 else x.unsqueeze(1)

    hot = is_target * (1.0 - options.label_smoothing)
    dz = _where_nonzero(along(ce_scale), p - hot)
    extra = soft.at_0 - ce_scale
    if soft.per_lse is not None:
        extra = extra + _where_nonzero(soft.per_lse, lse)
    if soft.at_0 is not ce_scale or soft.per_lse is not None:
        dz = dz + _where_nonzero(along(extra), p)
    if soft.flat is not None:
        dz = dz - along(soft.flat)
    return dz * _slope(z, options)


def _wide_step(
    logits: Tensor,
    norm: Tensor,
    options: RowOptions,
    *,
    norm_known: bool,
    soft: Soft | None,
    grad: Tensor | None,
) -> Wide:
    rows, vocab = logits.shape
    dtype = norm.dtype
    top, log_total = norm
    n_mean = rows if options.label_smoothing > 0 and not norm_known else 0
    n_metrics = rows if options.metrics and not norm_known else 0
    found = Wide(
        top.new_empty(n_mean),
        logits.new_empty(n_metrics, dtype=torch.int64),
        top.new_empty(n_metrics),
    )
    n_block = _rows_per_block(logits, dtype)
    # float32 logits that are to become their gradient are worked on where they are
    owned = grad is not None and logits.dtype == dtype and grad.data_ptr() == logits.data_ptr()
    scratch = None if owned else logits.new_empty((min(n_block, rows), vocab), dtype=dtype)
    for start in range(0, rows, n_block):
        part = slice(start, start + n_block)
        block = logits[part]
        z = block if scratch is None else scratch[: block.shape[0]].copy_(block)
        z = _scale_and_cap_(z, options)
        slope = _slope(z, options) if soft is not None else None
        if norm_known:
            z.sub_(top[part].unsqueeze(1)).sub_(log_total[part].unsqueeze(1)).exp_()
        else:
            torch.amax(z, dim=1, out=top[part])
            if n_metrics:
                torch.argmax(z, dim=1, out=found.best[part])
            z.sub_(top[part].unsqueeze(1))
            if n_mean:
                torch.mean(z, dim=1, out=found.mean[part])
            total = z.exp_().sum(dim=1)
            torch.log(total, out=log_total[part])
            if n_metrics:
                found.entropy[part] = torch.special.entr(z / total.unsqueeze(1)).sum(dim=1)
        if soft is None or slope is None or grad is None:
            continue
        factor = soft.at_0[part]
        if soft.per_lse is not None:
            lse = top[part] + log_total[part]
            factor = factor + _where_nonzero(soft.per_lse[part], lse)
        of_exp = factor if norm_known else factor / total
        if soft.flat is None and not slope.dim():
            z.mul_((of_exp * slope).unsqueeze(1))
        else:
            z.mul_(of_exp.unsqueeze(1))
            if soft.flat is not None:
                z.sub_(soft.flat[part].unsqueeze(1))
            z.mul_(slope)
        _zero_rows_(z, factor)
        if scratch is not None:
            grad[part] = z
    return found


def _rows_per_block(logits: Tensor, dtype: torch.dtype) -> int:
    budget = _SCRATCH_BYTES.get(logits.device.type, _SCRATCH_BYTES_ELSEWHERE)
    return max(1, budget // (logits.shape[1] * dtype.itemsize))


def _scale_and_cap_(raw: Tensor, options: RowOptions) -> Tensor:
    if options.logit_scale != 1.0:
        raw.mul_(options.logit_scale)
    return raw.div_(options.softcap).tanh_().mul_(options.softcap) if options.softcap else raw


def _slope(z: Tensor, options: RowOptions) -> Tensor:
    """Return dz/du = c (1 - (z/t)^2), a scalar tensor when there is no cap."""
    if not options.softcap:
        return z.new_full((), options.logit_scale)
    return z.div(options.softcap).square_().neg_().add_(1.0).mul_(options.logit_scale)


def _where_nonzero(scale: Tensor, value: Tensor) -> Tensor:
    return torch.where(scale != 0, scale * value, 0.0)


def _zero_rows_(z: Tensor, scale: Tensor) -> None:
    """Set the rows whose scale is 0 to 0, which a product would not do to inf and NaN."""
    if z.device.type == "cpu":  # no pass over the block when no row is ignored
        z.index_fill_(0, (scale == 0).nonzero().squeeze(1), 0.0)
    else:
        z.masked_fill_((scale == 0).unsqueeze(1), 0.0)
