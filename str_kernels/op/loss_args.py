"""The checked options of a loss, and their conversion to the arguments of the ops."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import get_args, get_type_hints

import torch
from torch import Tensor

from .backends import choose_backend
from .checks import (
    check_backend,
    check_count,
    check_device_of_number,
    check_row_weight,
    check_rows,
)
from .contracts import (
    LossArgs,
    Reduction,
    RowNumbers,
    RowOptions,
    SafetyPenalty,
    accumulation_dtype,
)
from .parallel import VocabShard

DEFAULT_PENALTY = SafetyPenalty()
_NUMBERS = tuple(one.name for one in fields(RowNumbers))
_FLOATS = tuple(name for name in _NUMBERS if get_type_hints(RowOptions)[name] is float)


@dataclass(frozen=True, eq=False, kw_only=True)
class LossOptions(RowNumbers):
    """The options that both loss functions share, checked on construction.

    The fields are keywords of `safety_cross_entropy`, which documents them. An option of only one
    of the two functions (`inplace`, or `chunk_bytes` and the parts of the head) is not here.

    Raises:
        TypeError: a field is of the wrong type.
        ValueError: a number is out of its range, or a name is unknown.
    """

    penalty: SafetyPenalty = DEFAULT_PENALTY
    safety_row_weight: Tensor | None = None  # (N,)
    ce_row_weight: Tensor | None = None  # (N,)
    num_items: float | Tensor | None = None
    num_safety_items: float | Tensor | None = None
    reduction: str = "mean"
    backend: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.penalty, SafetyPenalty):
            raise TypeError(f"`penalty` must be a SafetyPenalty; got {type(self.penalty).__name__}")
        if not isinstance(self.reduction, str) or self.reduction not in get_args(Reduction):
            raise ValueError(f"`reduction` must be 'mean', 'sum' or 'none'; got {self.reduction!r}")
        self.check_numbers()
        check_backend(self.backend)

    def check_against(self, like: Tensor) -> None:
        """Check the options against the rows: shapes and devices."""
        check_row_weight("safety_row_weight", self.safety_row_weight, like)
        check_row_weight("ce_row_weight", self.ce_row_weight, like)
        check_count("num_items", self.num_items, like.device)
        check_count("num_safety_items", self.num_safety_items, like.device)
        check_device_of_number("weight", self.penalty.weight, like.device)


def make_loss_args(
    like: Tensor,  # (N, ...) logits or hidden states
    target: Tensor,
    safety_ids: Tensor | None,
    ref: Tensor | None,
    options: LossOptions,
    shard: VocabShard | None = None,
) -> LossArgs:
    """Check the rows, and turn the options and defaults into the arguments of the ops."""
    check_rows(target, safety_ids, ref, like)
    options.check_against(like)
    penalty = options.penalty
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

    kept = (target != options.ignore_index).to(dtype)
    row_ce = kept
    if options.ce_row_weight is not None:
        row_ce = torch.where(kept != 0, options.ce_row_weight.detach().to(dtype), 0.0)
    row_safety = kept
    if options.safety_row_weight is not None:
        row_safety = options.safety_row_weight.detach().to(dtype)
    num_items, num_safety_items = options.num_items, options.num_safety_items
    if options.reduction != "mean":
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
        reduce=options.reduction != "none",
        backend=choose_backend(options.backend, like.device, like.dtype, spread=shard is not None),
        group_name="" if shard is None else shard.group.group_name,
        shard_sizes=[] if shard is None else list(shard.sizes),
        options=_row_options(options, ids),
    )


def _row_options(options: LossOptions, ids: int) -> RowOptions:
    """Return the numbers as an op takes them: an int given for a float becomes a float."""
    numbers = {name: getattr(options, name) for name in _NUMBERS}
    numbers.update({name: float(numbers[name] or 0.0) for name in _FLOATS})  # no softcap is 0.0
    penalty = options.penalty
    return RowOptions(
        **numbers,
        kind=penalty.kind if ids else "mse",  # without ids, the cheapest kind
        temperature=float(penalty.temperature),
        delta=float(penalty.delta),
    )


def _scalar(value: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(like.device, dtype, non_blocking=True)
    return torch.full((), float(value), dtype=dtype, device=like.device)


def _inverse(count: Tensor) -> Tensor:
    """Return 1 / count, and 0 for 0, so that the mean of nothing is 0."""
    return torch.where(count > 0, count.reciprocal(), 0.0)
