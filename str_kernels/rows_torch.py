"""The row step in plain PyTorch: for CPUs, for float64, and for any device without Triton.

A few rows at a time are copied to a float32 scratch block that stays in cache; everything else is
done there in place. So the width-V traffic is one read of the logits and one write of the gradient
per pass, and no tensor of the logits' size exists in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contracts import RowOptions, RowTerms, accumulation_dtype

_SCRATCH_BYTES = {"cpu": 2 << 20}  # about one core's L2; see docs/log.md for the measurement
_SCRATCH_BYTES_ELSEWHERE = 64 << 20  # a device needs many rows at once to be busy


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
) -> RowTerms:
    """Compute terms and gradient of every row; `contracts.RowStep` says what the arguments are."""
    rows, vocab = logits.shape
    dtype = accumulation_dtype(logits.dtype)
    inside = (target >= 0) & (target < vocab)
    ignored = target == options.ignore_index
    column = torch.where(inside, target, 0).unsqueeze(1)
    # Everything that single columns need is read before `grad`, which may be `logits`, is written.
    z_y = _scale_and_cap_(logits.gather(1, column).squeeze(1).to(dtype), options)
    # Two values of one logit: the row's own, which lse is made of, for the softmax, and the finer
    # one of `project` for the penalty. Mixing them would spoil p_y - 1 where y is a safety id.
    row_safety_logits = _scale_and_cap_(logits.index_select(1, safety_ids).to(dtype), options)
    if safety_logits is None:
        safety_logits = row_safety_logits

    terms_wanted = norm is None
    if norm is None:
        norm = logits.new_empty((2, rows), dtype=dtype)
    top, log_total = norm
    total = torch.empty_like(top)
    if ce_scale is not None:  # a label that is no column: the row's gradient is NaN
        ce_scale = torch.where(inside | ignored, ce_scale, torch.nan)
    n_block = _rows_per_block(logits, dtype)
    scratch = logits.new_empty((min(n_block, rows), vocab), dtype=dtype)
    for start in range(0, rows, n_block):
        part = slice(start, start + n_block)
        block = logits[part]
        z = _scale_and_cap_(scratch[: block.shape[0]].copy_(block), options)
        slope = _slope(z, options) if grad is not None else None
        if terms_wanted:
            torch.amax(z, dim=1, out=top[part])
            z.sub_(top[part].unsqueeze(1)).exp_()
            torch.sum(z, dim=1, out=total[part])
        else:
            z.sub_(top[part].unsqueeze(1)).sub_(log_total[part].unsqueeze(1)).exp_()
        if grad is not None and ce_scale is not None and slope is not None:
            scale = ce_scale[part] / total[part] if terms_wanted else ce_scale[part]
            z.mul_(scale.unsqueeze(1) if slope.dim() else (scale * slope).unsqueeze(1))
            _zero_rows_(z, ce_scale[part])
            grad[part] = z.mul_(slope) if slope.dim() else z

    drift = safety_logits - ref
    ids = safety_ids.shape[0]
    if terms_wanted:
        torch.log(total, out=log_total)
        # (lse - m) - (z_y - m): the small numbers are subtracted, not the large ones
        ce = torch.where(inside, log_total - (z_y - top), torch.nan)
        penalty = (id_weights * drift.square()).sum(dim=1) / max(ids, 1)
        worst = drift.abs().amax(dim=1) if ids else drift.new_zeros(rows)
        terms = RowTerms(torch.where(ignored, 0.0, ce), penalty, worst, norm)
    else:
        terms = RowTerms(top[:0], top[:0], top[:0], norm)

    if grad is not None and ce_scale is not None and penalty_scale is not None:
        # These columns hold more than softmax: each is computed whole, then rounded once.
        # Adding to the rounded softmax would lose most bits where p_y is near 1. (By index_put_:
        # scatter_ on a CPU allocates twice the size of `grad`.)
        row = torch.arange(rows, device=grad.device)
        on_y = _where_nonzero(ce_scale, torch.exp((z_y - top) - log_total) - 1.0) * _slope(
            z_y, options
        )
        grad[row, column.squeeze(1)] = on_y.to(grad.dtype)
        if ids:
            is_target = (safety_ids == target.unsqueeze(1)).to(dtype)
            p_s = torch.exp((row_safety_logits - top.unsqueeze(1)) - log_total.unsqueeze(1))
            on_ids = _where_nonzero(ce_scale.unsqueeze(1), p_s - is_target)
            on_ids *= _slope(row_safety_logits, options)
            pull = _where_nonzero(penalty_scale.unsqueeze(1), id_weights * drift * (2 / ids))
            on_ids += pull * _slope(safety_logits, options)
            grad[row.unsqueeze(1), safety_ids] = on_ids.to(grad.dtype)
    return terms


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
