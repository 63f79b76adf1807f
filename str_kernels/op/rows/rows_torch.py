"""The row step in plain PyTorch: for CPUs, for float64, and for any device without Triton.

The work on all V columns goes through a few rows at a time in a float32 scratch block that stays in
cache (or in the logits themselves, if they are float32 and may be overwritten). So each pass reads
the logits once and writes the gradient once, and no float32 copy of all logits exists. The columns
of the target and of the safety ids are computed separately, and rounded once.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..contracts import RowOptions, RowTerms, accumulation_dtype
from ..parallel import RowSums, VocabShard
from ..penalties import KINDS, NEEDS_NORM, ON_LOG_PROBS, Subset, subset_of

_BLOCK_BYTES_CPU = 2 << 20  # about one core's L2; see docs/log.md for the measurement
_BLOCK_BYTES = 64 << 20  # a GPU needs many rows at once to be busy


class Soft(NamedTuple):
    """The factors of a row's gradient that are the same for all V columns: (soft p_v - flat) dz/du.

    soft = ce_scale (1 + 2 zeta lse), minus the sum of the penalty's gradients on S for kinds on
    log-probabilities. Both are linear in lse, so soft = at_0 + per_lse * lse, and lse need not be
    known beforehand.
    """

    takes: Tensor  # (n,) bool: the row takes part; else its gradient is 0, even for inf and NaN
    at_0: Tensor  # (n,)
    per_lse: Tensor | None  # (n,)
    flat: Tensor | None  # (n,) ce_scale e / V


class Wide(NamedTuple):
    """Input and results of the work on all V columns, (n,) each.

    What is not requested is empty, of shape (n, 0), so that all fields can be cut into blocks.
    """

    target: Tensor
    top: Tensor  # m
    log_total: Tensor  # log d
    mean: Tensor  # mean_v (z_v - m), for label smoothing
    right: Tensor  # 1.0 where the first largest logit is the target's
    entropy: Tensor


class Scratch:
    """Memory for blocks of rows, shared by all blocks of a call."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def like(self, block: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        """Return memory of the block's shape; the first block is the largest."""
        if name not in self._held:
            self._held[name] = block.new_empty(block.shape, dtype=dtype)
        return self._held[name][: block.shape[0]]


class BlockStep(Protocol):
    """The work on all V columns of some rows: fill the fields of `wide`, write the gradient."""

    def __call__(
        self,
        logits: Tensor,  # (n, V)
        scratch: Scratch,
        wide: Wide,
        options: RowOptions,
        *,
        norm_known: bool,
        soft: Soft | None,
        grad: Tensor | None,  # (n, V)
    ) -> None:
        """Work on one block of rows."""
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
    block_step: BlockStep | None = None,
    block_bytes: int | None = None,
    shard: VocabShard | None = None,
) -> RowTerms:
    """Compute terms and gradient of every row; `contracts.RowStep` documents the arguments.

    With `shard`, `logits` and `grad` have this rank's columns and one more, which stands for all
    ids of other ranks and is 0 in the gradient. The other arguments and the terms are those of the
    whole vocabulary.
    """
    rows, vocab = logits.shape
    dtype = accumulation_dtype(logits.dtype)
    wide_logits, wide_grad, hit = logits, grad, target
    if shard is not None:
        vocab = shard.vocab
        wide_logits, wide_grad = logits[:, :-1], None if grad is None else grad[:, :-1]
    inside = (target >= 0) & (target < vocab)
    ignored = target == options.ignore_index
    column = torch.where(inside, target, 0)
    id_columns = safety_ids
    if shard is not None:
        hit = column = shard.columns(target)
        id_columns = shard.columns(safety_ids)
    # Read the single columns before `grad` is written, since `grad` may be `logits`.
    z_y = _scale_and_cap_(logits.gather(1, column.unsqueeze(1)).squeeze(1).to(dtype), options)
    # Each safety logit has two values: the row's own, from which lse comes, for the softmax, and
    # the more precise one of `project` for the penalty. Mixing them would spoil p_y - 1 at y in S.
    row_safety_logits = _scale_and_cap_(logits.index_select(1, id_columns).to(dtype), options)
    z_s = row_safety_logits if safety_logits is None else safety_logits

    norm_known = norm is not None
    if norm is None:
        norm = logits.new_empty((2, rows), dtype=dtype)
    has_grad = ce_scale is not None and penalty_scale is not None and grad is not None
    top, log_total = norm
    smooth, metrics = (
        options.label_smoothing > 0 and not norm_known,
        options.metrics and not norm_known,
    )
    asked = (top.new_empty(rows if on else (rows, 0)) for on in (smooth, metrics, metrics))
    wide = Wide(hit, top, log_total, *asked)
    if block_bytes is None:
        block_bytes = _BLOCK_BYTES_CPU if logits.device.type == "cpu" else _BLOCK_BYTES
    n_block = max(1, block_bytes // max(wide_logits.shape[1] * dtype.itemsize, 1))
    step = block_step or _block_step
    if shard is not None and not norm_known:
        # the gradient needs the norm of the whole row, so the logits are read twice
        wide, z_y = _exchange(shard, step, n_block, wide_logits, wide, z_y, options)
        norm = torch.stack((wide.top, wide.log_total))
        top, log_total = norm
    known = norm_known or shard is not None
    if not known and has_grad and options.kind in NEEDS_NORM:
        _in_blocks(step, n_block, wide_logits, wide, options, False, None, None)
        known = True
    soft = None
    if ce_scale is not None and penalty_scale is not None and has_grad:
        # an invalid label makes the row's gradient NaN
        ce_scale = torch.where(inside | ignored, ce_scale, torch.nan)
        subset = subset_of(z_s, ref, id_weights, top + log_total if known else None, options)
        soft = _soft(ce_scale, penalty_scale, subset, vocab)
    if not known or soft is not None:
        _in_blocks(step, n_block, wide_logits, wide, options, known, soft, wide_grad)
    lse = top + log_total
    subset = subset_of(z_s, ref, id_weights, lse, options)
    if norm_known:
        none = top[:0]
        terms = RowTerms(none, none, none, norm, none, none)
    else:
        # (lse - m) - (z_y - m): subtracts small numbers, not the large lse and z_y
        ce = log_total - (z_y - top)
        if options.label_smoothing > 0:
            e = options.label_smoothing
            ce = (1 - e) * ce + e * (log_total - wide.mean)
        ce = torch.where(ignored, 0.0, torch.where(inside, ce, torch.nan))
        penalty = KINDS[options.kind].phi(subset)
        drift = subset.drift.abs()
        worst = drift.amax(dim=1) if drift.shape[1] else top.new_zeros(rows)
        terms = RowTerms(ce, penalty, worst, norm, wide.right.flatten(), wide.entropy.flatten())

    if soft is not None and grad is not None and ce_scale is not None and penalty_scale is not None:
        # The gradient here is more than the softmax. It is computed in full and rounded once, since
        # adding to the rounded softmax would lose most bits if p_y is near 1. (Not by scatter_,
        # which on a CPU allocates twice the size of `grad`.)
        row = torch.arange(rows, device=grad.device)
        p_y = torch.exp((z_y - top) - log_total)
        grad[row, column] = _column(p_y, 1.0, z_y, soft, ce_scale, lse, options).to(grad.dtype)
        if safety_ids.shape[0]:
            p_s = torch.exp((row_safety_logits - top.unsqueeze(1)) - log_total.unsqueeze(1))
            is_target = (safety_ids == target.unsqueeze(1)).to(dtype)
            on_ids = _column(p_s, is_target, row_safety_logits, soft, ce_scale, lse, options)
            pull = _where_nonzero(penalty_scale.unsqueeze(1), KINDS[options.kind].slope(subset))
            on_ids += torch.where(pull != 0, pull * _slope(z_s, options), 0.0)
            grad[row.unsqueeze(1), id_columns] = on_ids.to(grad.dtype)
        if shard is not None:
            grad[:, -1] = 0
    return terms


def _exchange(
    shard: VocabShard,
    step: BlockStep,
    n_block: int,
    logits: Tensor,  # (n, this rank's columns)
    wide: Wide,
    z_y: Tensor,
    options: RowOptions,
) -> tuple[Wide, Tensor]:
    """Compute the sums over this rank's columns, and combine them with the other ranks'."""
    if logits.shape[1]:
        _in_blocks(step, n_block, logits, wide, options, False, None, None)
    else:
        wide.top.fill_(-torch.inf)
        for found in wide[2:]:
            found.zero_()
    target, *own = wide
    z_y = torch.where(target < logits.shape[1], z_y, 0.0)
    top, log_total, z_y, *rest = shard.whole_rows(RowSums(own[0], own[1], z_y, *own[2:]))
    return Wide(target, top, log_total, *rest), z_y


def _soft(ce_scale: Tensor, penalty_scale: Tensor, subset: Subset, vocab: int) -> Soft:
    options, id_weights = subset.options, subset.a
    takes, at_0, per_lse, flat = ce_scale != 0, ce_scale, None, None
    if options.z_loss_weight > 0:
        per_lse = 2 * options.z_loss_weight * ce_scale
    if options.kind in ON_LOG_PROBS and id_weights.shape[0]:
        takes = takes | (penalty_scale != 0)
    if options.kind in NEEDS_NORM and id_weights.shape[0]:
        pull = KINDS[options.kind].slope(subset).sum(dim=1)
        at_0 = at_0 - _where_nonzero(penalty_scale, pull)
    elif options.kind in ON_LOG_PROBS and id_weights.shape[0]:
        # minus the sum over k of penalty_scale * 2/K a_k (z_S_k - r_k - lse)
        share = penalty_scale * (2.0 / id_weights.shape[0])
        of_0 = (id_weights * (subset.z - subset.ref)).sum(dim=1)
        at_0 = at_0 - _where_nonzero(share, of_0)
        per_lse = share * id_weights.sum() + (0.0 if per_lse is None else per_lse)
    if options.label_smoothing > 0:
        flat = ce_scale * (options.label_smoothing / vocab)
    return Soft(takes, at_0, per_lse, flat)


def _column(
    p: Tensor,  # (n,) or (n, K)
    is_target: Tensor | float,
    z: Tensor,
    soft: Soft,
    ce_scale: Tensor,
    lse: Tensor,
    options: RowOptions,
) -> Tensor:
    """Return single columns of the gradient, unrounded and without the penalty's direct part."""

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
    # torch.where, not only a product: with a cap, a masked row's NaN makes the slope NaN
    return torch.where(dz != 0, dz * _slope(z, options), 0.0)


def _in_blocks(
    step: BlockStep,
    n_block: int,
    logits: Tensor,
    wide: Wide,
    options: RowOptions,
    norm_known: bool,
    soft: Soft | None,
    grad: Tensor | None,
) -> None:
    rows = logits.shape[0]
    scratch = Scratch()
    for start in range(0, rows, n_block):
        part = slice(start, min(start + n_block, rows))
        step(
            logits[part],
            scratch,
            Wide(*(x[part] for x in wide)),
            options,
            norm_known=norm_known,
            soft=soft and Soft._make(x if x is None else x[part] for x in soft),
            grad=None if grad is None else grad[part],
        )


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
    # float32 logits that the gradient overwrites anyway need no copy
    dtype = wide.top.dtype
    owned = grad is not None and logits.dtype == dtype and grad.data_ptr() == logits.data_ptr()
    z = logits if owned else scratch.like(logits, "z", dtype).copy_(logits)
    z = _scale_and_cap_(z, options)
    slope = _slope(z, options) if soft is not None else None
    total = None
    if norm_known:
        z.sub_(wide.top.unsqueeze(1)).sub_(wide.log_total.unsqueeze(1)).exp_()
    else:
        torch.amax(z, dim=1, out=wide.top)
        if wide.right.dim() == 1:
            wide.right.copy_(z.argmax(dim=1) == wide.target)
        z.sub_(wide.top.unsqueeze(1))
        if wide.mean.dim() == 1:
            torch.mean(z, dim=1, out=wide.mean)
        total = z.exp_().sum(dim=1)
        torch.log(total, out=wide.log_total)
        if wide.entropy.dim() == 1:
            wide.entropy.copy_(torch.special.entr(z / total.unsqueeze(1)).sum(dim=1))
    if soft is None or slope is None or grad is None:
        return
    factor = soft.at_0
    if soft.per_lse is not None:
        factor = factor + _where_nonzero(soft.per_lse, wide.top + wide.log_total)
    if total is not None:
        factor = factor / total
    if soft.flat is None and not slope.dim():
        z.mul_((factor * slope).unsqueeze(1))
    else:
        z.mul_(factor.unsqueeze(1))
        if soft.flat is not None:
            z.sub_(soft.flat.unsqueeze(1))
        z.mul_(slope)
    _zero_rows_(z, ~soft.takes)
    if not owned:
        grad.copy_(z)


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


def _zero_rows_(z: Tensor, rows: Tensor) -> None:
    """Set masked rows to 0, even if they hold inf or NaN."""
    if z.device.type == "cpu":  # touches no memory if no row is ignored
        z.index_fill_(0, rows.nonzero().squeeze(1), 0.0)
    else:
        z.masked_fill_(rows.unsqueeze(1), 0.0)
