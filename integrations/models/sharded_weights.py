"""Weights that are split over ranks: by tensor parallelism, FSDP2 or DeepSpeed's ZeRO-3.

Tensor parallelism and FSDP2 turn weights into DTensors. With tensor parallelism all ranks of a
group compute on the same rows of the batch, and `safety_linear_cross_entropy` takes a head that is
split by its rows as it is. With FSDP2 the ranks have different rows of the batch, so the head must
be gathered first. ZeRO-3 leaves empty parameters, with their shape in `ds_shape`, and fills them
for the forward and the backward of their module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def group_of(weight: Tensor) -> str:
    """Return the name of the process group that a weight is split over, "" for a plain one."""
    mesh = getattr(weight, "device_mesh", None)
    return "" if mesh is None else "+".join(group.group_name for group in mesh.get_all_groups())


def whole(part: Tensor) -> Tensor:
    """Return the full weight on every rank: a gathered copy if it is split."""
    gather = getattr(part, "full_tensor", None)
    gathered: Tensor = part if gather is None else gather()
    return gathered


def rows_of(weight: Tensor) -> int:
    """Return the number of rows of the full weight."""
    shape = getattr(weight, "ds_shape", weight.shape)
    return int(shape[0])


def check_not_sharded(name: str, model: nn.Module) -> None:
    """Refuse a model that cannot be probed because its weights are sharded by FSDP2 or ZeRO-3.

    A ZeRO-3 `model` can be probed once DeepSpeed's hooks, which fill its parameters, are in place.
    """
    put_away = any(map(_is_put_away, model.parameters()))
    if put_away and name != "model":
        raise ValueError(
            f"`{name}` must be whole on each rank; got one whose parameters ZeRO-3 has put away"
        )
    if put_away and not hasattr(model, "ds_inflight_param_registry"):
        raise ValueError(
            f"`{name}` must be given to attach() after deepspeed.initialize() when ZeRO-3 has put "
            "its parameters away before (zero.Init does, and so from_pretrained); got one without "
            "DeepSpeed's hooks"
        )
    if any(map(_is_fsdp, model.modules())):
        raise ValueError(
            f"`{name}` must be given to attach() before fully_shard(); got one that is sharded"
            + ("" if name == "model" else ". Each rank holds it whole, or it is tensor parallel")
        )


@contextlib.contextmanager
def in_memory(module: nn.Module) -> Iterator[None]:
    """Gather a module's weights outside of its forward, if FSDP2 or ZeRO-3 has sharded them."""
    put_away = [parameter for parameter in module.parameters() if _is_put_away(parameter)]
    if put_away:
        import deepspeed

        missing = [parameter for parameter in put_away if not parameter.numel()]
        with deepspeed.zero.GatheredParameters(missing):
            yield
        return
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
    """Refuse a head that is split differently than when it was attached."""
    if group_of(weight) != group:
        raise ValueError(
            "`model` must have its head in one unit of fully_shard() with the model, in one of its "
            "own, or in one with the embeddings, and keep how tensor parallelism spread it; got a "
            f"weight placed as {getattr(weight, 'placements', 'a plain tensor')}"
        )


def _is_put_away(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id")


def _is_fsdp(module: Any) -> bool:
    # by its methods, since torch.distributed.fsdp is slow to import
    return hasattr(module, "unshard") and hasattr(module, "reshard")
