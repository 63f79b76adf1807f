"""Vocabulary parallelism: which rank has which columns of the logits, and the communication.

Every rank of a process group has some consecutive rows of the head, and all rows of the batch. It
computes its own columns of the logits. The ranks exchange, for each row, the norm, the target's
logit and the safety logits. They combine them in the same order, so that the loss is bitwise equal
on all ranks. docs/loss.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_SIZES: Any = WeakTensorKeyDictionary()  # a weight -> {group's name: the ranks' sizes}


class RowSums(NamedTuple):
    """One rank's contribution to each row; what is not requested is empty, (n, 0)."""

    top: Tensor  # (n,) m, the largest of its logits
    log_total: Tensor  # (n,) log sum exp(z - m)
    z_y: Tensor  # (n,) the target's logit, 0 if another rank has the target
    mean: Tensor  # (n,) mean_v (z_v - m)
    right: Tensor  # (n,) 1.0 where its first largest logit is the target's
    entropy: Tensor  # (n,) of the softmax of its logits


class VocabShard(NamedTuple):
    """This rank's columns of the logits.

    Attributes:
        group: the ranks that share a vocabulary.
        sizes: number of columns of each rank, in the order of the ranks.
    """

    group: Any  # ProcessGroup; Any where torch was built without torch.distributed
    sizes: tuple[int, ...]

    @classmethod
    def named(cls, group_name: str, sizes: list[int]) -> VocabShard | None:
        """Return the shard for a group's name, which is all that an op can take; None for ""."""
        if not group_name:
            return None
        # the only way to get a group by its name
        c10d: Any = torch.distributed.distributed_c10d
        return cls(c10d._resolve_process_group(group_name), tuple(sizes))

    @property
    def vocab(self) -> int:
        """Return V, the number of columns of all ranks."""
        return sum(self.sizes)

    @property
    def width(self) -> int:
        """Return the number of this rank's columns."""
        width: int = self.sizes[self.group.rank()]
        return width

    def columns(self, ids: Tensor) -> Tensor:
        """Turn ids into this rank's columns; an id of another rank becomes `width`."""
        column = ids - sum(self.sizes[: self.group.rank()])
        return torch.where((column >= 0) & (column < self.width), column, self.width)

    def sum_over_ranks_(self, values: Tensor) -> Tensor:
        """Add the ranks' values up, in place."""
        dist.all_reduce(values, group=self.group)
        return values

    def whole_rows(self, own: RowSums) -> RowSums:
        """Combine the ranks' contributions to each row, by one all-gather of (n,) columns.

        m = max_r m_r;  d = sum_r d_r exp(m_r - m);  with w_r = d_r exp(m_r - m) / d the entropy is
        sum_r w_r H_r - w_r log w_r. The first largest logit is that of the first rank whose m_r
        is m.
        """
        asked = [name for name, column in own._asdict().items() if column.dim() == 1]
        sent = torch.stack([getattr(own, name) for name in asked])
        parts = dict(zip(asked, _all_gather(sent, self.group).unbind(1), strict=True))  # (p, n)
        tops = parts["top"]
        top = tops.amax(dim=0)
        nothing = tops == -torch.inf  # a rank without columns, or with -inf in all of them
        totals = torch.where(nothing, 0.0, torch.exp((tops - top) + parts["log_total"]))
        total = totals.sum(dim=0)
        mean, right, entropy = own.mean, own.right, own.entropy
        if "mean" in parts:
            means = torch.where(nothing, -torch.inf, parts["mean"] + (tops - top)).unbind(0)
            sums = [size * of_rank for size, of_rank in zip(self.sizes, means, strict=True) if size]
            mean = torch.stack(sums).sum(dim=0) / self.vocab
        if "right" in parts:
            first = (tops == top).to(top.dtype).argmax(dim=0, keepdim=True)
            right = parts["right"].gather(0, first).squeeze(0)
        if "entropy" in parts:
            share = totals / total
            of_ranks = share * parts["entropy"] + torch.special.entr(share)
            entropy = torch.where(share != 0, of_ranks, 0.0).sum(dim=0)
        return RowSums(top, total.log(), parts["z_y"].sum(dim=0), mean, right, entropy)


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks. Every rank has the gradient of the sum, which is also that of its part."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, shard: VocabShard) -> Tensor:
        return shard.sum_over_ranks_(values.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _SameOnRanks(torch.autograd.Function):
    """Identity on a value that every rank has. Backward sums the ranks' parts of its gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, shard: VocabShard) -> Tensor:
        ctx.shard = shard
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.shard.sum_over_ranks_(grads[0].clone()), None


def sum_over_ranks(values: Tensor, shard: VocabShard | None) -> Tensor:
    """Sum the ranks' parts of a value that all of them then use in the same way."""
    apply: Callable[..., Tensor] = _SumOverRanks.apply
    return values if shard is None else apply(values, shard)


def same_on_ranks(values: Tensor, shard: VocabShard | None) -> Tensor:
    """Mark a value that all ranks have and that each now uses in its own way."""
    apply: Callable[..., Tensor] = _SameOnRanks.apply
    return values if shard is None else apply(values, shard)


def local_rows(
    named: dict[str, Tensor | None], process_group: Any
) -> tuple[list[Tensor | None], VocabShard | None]:
    """Return this rank's rows of the head's parts, and how the vocabulary is divided.

    Args:
        named: the weight and the other parts with a row per vocabulary id, by argument name. For a
            DTensor placed Shard(0) on a one-dimensional mesh, its local part and the mesh's group
            are used, and its gradient is a DTensor with the same placement.
        process_group: the group, or None for a head that is whole or a DTensor.

    Raises:
        TypeError: `process_group` is not one.
        ValueError: this rank is not in it, or a DTensor is placed in another way or on another
            group.
    """
    check_group(process_group)
    (name, weight), *_ = named.items()
    if not any(hasattr(part, "placements") for part in named.values()):
        if process_group is None or not isinstance(weight, Tensor) or not weight.dim():
            return list(named.values()), None
        return list(named.values()), VocabShard(process_group, _sizes_of(weight, process_group))
    sizes: tuple[int, ...] | None = None
    local: list[Tensor | None] = []
    group = process_group
    for name, part in named.items():
        if not hasattr(part, "placements"):
            local.append(part)
            continue
        of_part, sizes_of_part = _sharded(name, part)
        if group is not None and of_part.group_name != group.group_name:
            raise ValueError(
                f"`{name}` must be placed on `process_group`, or `process_group` be None; got "
                f"a DTensor on group {of_part.group_name}, not {group.group_name}"
            )
        if sizes not in (None, sizes_of_part):
            raise ValueError(f"`{name}` must be spread as `linear_weight` is, {sizes}")
        group, sizes = of_part, sizes_of_part
        local.append(part.to_local())  # type: ignore[union-attr]
    if sizes is None or not hasattr(weight, "placements"):
        raise ValueError("`linear_weight` must be a DTensor where another part of the head is")
    return local, VocabShard(group, sizes)


def check_group(process_group: Any) -> None:
    """Check that `process_group` is a process group that contains this process."""
    if process_group is None:
        return
    if not hasattr(process_group, "group_name"):
        if dist.is_available() and process_group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("`process_group` must contain this rank")
        got = type(process_group).__name__
        raise TypeError(f"`process_group` must be a torch.distributed ProcessGroup; got {got}")


def _sharded(name: str, part: Any) -> tuple[Any, tuple[int, ...]]:
    """Return the group that a DTensor's rows are divided over, and each rank's number of rows."""
    mesh, placements = part.device_mesh, part.placements
    # torch.distributed.tensor needs no import here: a part with placements has loaded it
    if mesh.ndim != 1 or not placements[0].is_shard(0) or not _is_plain_shard(placements[0]):
        raise ValueError(
            f"`{name}` must be a plain tensor, or a DTensor placed Shard(0) on a mesh of one "
            f"dimension; got one placed as {placements} on a mesh of {mesh.ndim}: gather it first "
            "(full_tensor())"
        )
    ranks, rows = mesh.size(), part.shape[0]
    each = -(-rows // ranks)  # as torch.chunk does
    sizes = tuple(max(0, min(each, rows - rank * each)) for rank in range(ranks))
    if part.to_local().shape[0] != sizes[mesh.get_local_rank()]:
        raise ValueError(f"`{name}` must be spread as torch spreads a Shard(0); got another way")
    return mesh.get_group(), sizes


def _is_plain_shard(placement: Any) -> bool:
    return type(placement).__name__ == "Shard"  # not FSDP2's strided subclass


def _sizes_of(weight: Tensor, group: Any) -> tuple[int, ...]:
    """Gather the ranks' numbers of rows of the head, once for each weight.

    The result is cached by weight, because all ranks see a new weight in the same call.
    """
    known: dict[str, tuple[int, ...]] = _SIZES.setdefault(weight, {})
    if group.group_name not in known:
        own = torch.tensor([weight.shape[0]], device=weight.device)
        known[group.group_name] = tuple(_all_gather(own, group).flatten().tolist())
    return known[group.group_name]


def _all_gather(own: Tensor, group: Any) -> Tensor:  # (p, *own.shape)
    gathered = own.new_empty((group.size(), *own.shape))
    # a list of outputs, because the function with one output tensor was renamed in torch 2.13
    dist.all_gather(list(gathered.unbind(0)), own, group=group)
    return gathered
