"""From a caller's keyword arguments to LossArgs: every check, every default, in one place."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import choose_backend
from .checks import check_count, check_device_of_number, check_options, check_row_weight, check_rows
from .contracts import IGNORE_INDEX, LossArgs, SafetyPenalty, accumulation_dtype
from .parallel import VocabShard

DEFAULT_PENALTY = SafetyPenalty()


def make_loss_args(
    like: Tensor,  # (N, ...) logits or hidden states
    target: Tensor,
    safety_ids: Tensor | None,
    ref: Tensor | None,
    *,
    penalty: SafetyPenalty = DEFAULT_PENALTY,
    safety_row_weight: Tensor | None = None,
    ce_row_weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    num_safety_items: float | Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    metrics: bool = False,
    backend: str = "auto",
    shard: VocabShard | None = None,
) -> LossArgs:
    """Check what both functions share and turn every default into a tensor."""
    check_options(
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss_weight=z_loss_weight,
        logit_scale=logit_scale,
        softcap=softcap,
        metrics=metrics,
        ignore_index=ignore_index,
    )
    check_rows(target, safety_ids, ref, like)
    check_row_weight("safety_row_weight", safety_row_weight, like)
    check_row_weight("ce_row_weight", ce_row_weight, like)
    check_count("num_items", num_items, like.device)
    check_count("num_safety_items", num_safety_items, like.device)
    if not isinstance(penalty, SafetyPenalty):
        raise TypeError(f"`penalty` must be a SafetyPenalty; got {type(penalty).__name__}")
    check_device_of_number("weight", penalty.weight, like.device)
    dtype = accumulation_dtype(like.dtype)
    rows = like.shape[0]
    id_weights = penalty.id_weights_on(like.device, dtype)
    if safety_ids is None or ref is None:
        safety_ids, id_weights = target.new_empty(0), None
        ref = like.new_empty((rows, 0), dtype=dtype)
    ids = safety_ids.shape[0]
    if id_weights is None:
        id_weights = like.new_ones(ids, dtype=dtype)
    elif id_weights.shape[0] != ids:
        raise ValueError(
            f"`id_weights` must have shape ({ids},), one per safety id; "
            f"got {tuple(id_weights.shape)}"
        )

    kept = (target != ignore_index).to(dtype)
    row_ce = kept
    if ce_row_weight is not None:
        row_ce = torch.where(kept != 0, ce_row_weight.detach().to(dtype), 0.0)
    row_safety = kept if safety_row_weight is None else safety_row_weight.detach().to(dtype)
    if reduction != "mean":
        num_items = num_safety_items = 1.0
    items = kept.sum() if num_items is None else _scalar(num_items, like, dtype)
    safety_items = (
        row_safety.sum() if num_safety_items is None else _scalar(num_safety_items, like, dtype)
    )
    return LossArgs(
        target=target,
        safety_ids=safety_ids,
        ref=ref.detach().to(dtype).expand(rows, ids),
        row_ce=row_ce,
        row_safety=row_safety,
        id_weights=id_weights.detach(),
        penalty_weight=_scalar(penalty.weight, like, dtype),
        inv_items=_inverse(items),
        inv_safety_items=_inverse(safety_items),
        ignore_index=ignore_index,
        logit_scale=float(logit_scale),
        softcap=float(softcap or 0.0),
        label_smoothing=float(label_smoothing),
        z_loss_weight=float(z_loss_weight),
        kind=penalty.kind if ids else "mse",  # of nothing, the one that asks for least
        temperature=float(penalty.temperature),
        delta=float(penalty.delta),
        metrics=metrics,
        reduce=reduction != "none",
        backend=choose_backend(backend, like.device, like.dtype, spread=shard is not None),
        group_name="" if shard is None else shard.group.group_name,
        shard_sizes=[] if shard is None else list(shard.sizes),
    )


def _scalar(value: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(like.device, dtype, non_blocking=True)
    return torch.full((), float(value), dtype=dtype, device=like.device)


def _inverse(count: Tensor) -> Tensor:
    """Return 1 / count, and 0 for 0: an empty sum divided by nothing is 0."""
    return torch.where(count > 0, count.reciprocal(), 0.0)
