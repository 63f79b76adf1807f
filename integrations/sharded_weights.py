"""Weights that are spread over ranks: by tensor parallelism for good, by FSDP2 between its uses.

Both leave DTensors. A head that tensor parallelism spread by its rows is one that every rank of its
group computes with on the same rows of the batch, and `safety_linear_cross_entropy` takes it so.
One that FSDP2 spread has to be whole first: its ranks have rows of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def group_of(weight: Tensor) -> str:
    """Return the name of the group that a weight is spread over, "" for a plain one."""
    mesh = getattr(weight, "device_mesh", None)
    return "" if mesh is None else "+".join(group.group_name for group in mesh.get_all_groups())


def whole(part: Tensor) -> Tensor:
    """Return all of a weight, on every rank: a copy where it is spread."""
    gather = getattr(part, "full_tensor", None)
    gathered: Tensor = part if gather is None else gather()
    return gathered


def check_not_sharded(name: str, model: nn.Module) -> None:
    """Refuse a model that FSDP2 or ZeRO-3 has spread: outside its own forward it has but parts."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            f"`{name}` must not be spread by DeepSpeed's ZeRO-3, under which the head is put away "
            "before the loss reads it. ZeRO-2, FSDP2 and tensor parallelism are exact"
        )
    if any(map(_is_fsdp, model.modules())):
        raise ValueError(
            f"`{name}` must be given to attach() before fully_shard(); got one that is sharded"
            + ("" if name == "model" else ". Each rank holds it whole, or it is tensor parallel")
        )


@contextlib.contextmanager
def in_memory(module: nn.Module) -> Iterator[None]:
    """Let a module that is an FSDP2 unit of its own have its weights, after its forward too."""
    if not _is_fsdp(module):
        yield
        return
    unit: Any = module
    unit.unshard()
    try:
        yield
    finally:
        unit.reshard()


def check_group(weight: Tensor, group: str) -> None:
    """Refuse a head that is spread otherwise than when it was attached."""
    if group_of(weight) != group:
        raise ValueError(
            "`model` must have its head in one unit of fully_shard() with the model, in one of its "
            "own, or in one with the embeddings, and keep how tensor parallelism spread it; got a "
            f"weight placed as {getattr(weight, 'placements', 'a plain tensor')}"
        )


def _is_fsdp(module: Any) -> bool:
    # by its methods: torch.distributed.fsdp takes its time to import
    return hasattr(module, "unshard") and hasattr(module, "reshard")
