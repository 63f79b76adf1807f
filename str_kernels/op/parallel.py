"""A vocabulary spread over ranks: which columns are whose, and what the ranks tell each other.

Every rank of a process group holds some consecutive rows of the head, and sees all rows of the
batch. It makes its own columns of the logits, and learns of the others' what a row needs: the
norm, the target's logit and the safety logits. Those are combined in the same order on every rank,
so that the loss is equal in every bit. docs/loss.md has the formulas.
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
    """What one rank knows of each row; what was not asked for is empty, (n, 0)."""

    top: Tensor  # (n,) m, the largest of its logits
    log_total: Tensor  # (n,) log sum exp(z - m)
    z_y: Tensor  # (n,) the target's logit, 0 where the target is another rank's
    mean: Tensor  # (n,) mean_v (z_v - m)
    right: Tensor  # (n,) 1.0 where its first largest logit is the target's
    entropy: Tensor  # (n,) of the softmax of its logits


class VocabShard(NamedTuple):
    """The columns of the logits that this rank has.

    Attributes:
        group: the ranks that share a vocabulary.
        sizes: how many columns each of them has, in their order.
    """

    group: Any  # ProcessGroup; Any where torch was built without torch.distributed
    sizes: tuple[int, ...]

    @classmethod
    def named(cls, group_name: str, sizes: list[int]) -> VocabShard | None:
        """Return the shard of a group given by its name, as an op has to; None for ""."""
        if not group_name:
            return None
        # the one way from a name, which is all that an op's schema can hold, to its group
        c10d: Any = torch.distributed.distributed_c10d
        return cls(c10d._resolve_process_group(group_name), tuple(sizes))

    @property
    def vocab(self) -> int:
        """Return V, all ranks' columns."""
        return sum(self.sizes)

    @property
    def width(self) -> int:
        """Return how many columns are this rank's."""
        width: int = self.sizes[self.group.rank()]
        return width

    def columns(self, ids: Tensor) -> Tensor:
        """Turn ids into this rank's columns; `width` stands for all that is not here."""
        column = ids - sum(self.sizes[: self.group.rank()])
        return torch.where((column >= 0) & (column < self.width), column, self.width)

    def sum_over_ranks_(self, values: Tensor) -> Tensor:
        """Add the ranks' values up, in place."""
        dist.all_reduce(values, group=self.group)
        return values

    def whole_rows(self, own: RowSums) -> RowSums:
        """Combine what the ranks know of each row, by one all-gather of (n,) columns.

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
    """Adds up in the forward; every rank goes on with the sum, so the gradient is passed on."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, shard: VocabShard) -> Tensor:
        return shard.sum_over_ranks_(values.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _SameOnRanks(torch.autograd.Function):
    """Passes on what every rank has; each has a part of its gradient, which are added up."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, shard: VocabShard) -> Tensor:
        ctx.shard = shard
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.shard.sum_over_ranks_(grads[0].clone()), None


def sum_over_ranks(values: Tensor, shard: VocabShard | None) -> Tensor:
    """Add up the ranks' parts of what all of them go on with."""
    apply: Callable[..., Tensor] = _SumOverRanks.apply
    return values if shard is None else apply(values, shard)


def same_on_ranks(values: Tensor, shard: VocabShard | None) -> Tensor:
    """Mark what all ranks have, where each begins to use it in its own way."""
    apply: Callable[..., Tensor] = _SameOnRanks.apply
    return values if shard is None else apply(values, shard)


def local_rows(
    named: dict[str, Tensor | None], process_group: Any
) -> tuple[list[Tensor | None], VocabShard | None]:
    """Return this rank's rows of the head's parts, and how the vocabulary is spread.

    Args:
        named: the weight and what has rows as it has, by argument. A DTensor placed Shard(0) on a
            mesh of one dimension is taken as it is: its part here, and the mesh's group. The
            gradient then is a DTensor with the same placement.
        process_group: the group, or None for a head that is whole or says it itself.

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
    """Check that it is a process group, and that this process is in it."""
    if process_group is None:
        return
    if not hasattr(process_group, "group_name"):
        if dist.is_available() and process_group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("`process_group` must contain this rank")
        got = type(process_group).__name__
        raise TypeError(f"`process_group` must be a torch.distributed ProcessGroup; got {got}")


def _sharded(name: str, part: Any) -> tuple[Any, tuple[int, ...]]:
    """Return the group that a DTensor's rows are spread over, and each rank's number of them."""
    mesh, placements = part.device_mesh, part.placements
    # no import of torch.distributed.tensor: a part that has placements has loaded it
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
    return type(placement).__name__ == "Shard"  # and not one of FSDP2's strided ones


def _sizes_of(weight: Tensor, group: Any) -> tuple[int, ...]:
    """Ask the ranks how many rows of the head they have; once for each weight.

    The weight is what the answer is kept with, since every rank sees a new one at the same time.
    """
    known: dict[str, tuple[int, ...]] = _SIZES.setdefault(weight, {})
    if group.group_name not in known:
        own = torch.tensor([weight.shape[0]], device=weight.device)
        known[group.group_name] = tuple(_all_gather(own, group).flatten().tolist())
    return known[group.group_name]


def _all_gather(own: Tensor, group: Any) -> Tensor:  # (p, *own.shape)
    gathered = own.new_empty((group.size(), *own.shape))
    # into its parts: the form with one tensor has another name since torch 2.13
    dist.all_gather(list(gathered.unbind(0)), own, group=group)
    return gathered
