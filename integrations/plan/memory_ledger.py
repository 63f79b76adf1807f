"""Counts the memory of code that runs on fake tensors, which have shapes but no values.

A model on the meta device gets fake weights, and its forward and backward run op by op as on a CPU,
without computing anything. The storage of each op's result is added to a sum, and subtracted when
the last reference to it is gone, as an allocator would see it.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils
from typing_extensions import override


class MemoryLedger(TorchDispatchMode):
    """Sums the bytes of all live storages, and keeps the largest sum.

    Memory that an op allocates and frees internally is not seen.
    """

    def __init__(self, part: Callable[[], str] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's has no types
        self.part = part  # names what is being computed; if given, `events` has each change
        self.events: list[tuple[int, str]] = []  # bytes, and the part that allocated them
        self.live = 0
        self.peak = 0
        self.apart = 0  # bytes of `live` that the caller excludes from `peak_of_rest`
        self.peak_of_rest = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._storages:
            return
        part = None if self.part is None else self.part()
        self._storages[key] = weakref.ref(storage, lambda _: self._drop(key, size, part))
        if part is not None:
            self.events.append((size, part))
        self.live += size
        self.peak = max(self.peak, self.live)
        self.peak_of_rest = max(self.peak_of_rest, self.live - self.apart)

    def restart(self) -> int:
        """Return the peak since the last call, and restart it from what is live now."""
        peak, self.peak, self.peak_of_rest = self.peak, self.live, self.live - self.apart
        return peak

    def _drop(self, key: int, size: int, part: str | None) -> None:
        del self._storages[key]
        if part is not None:
            self.events.append((-size, part))
        self.live -= size

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.prim.device.default:  # 9 of 10 calls, without a tensor
            for leaf in out if isinstance(out, (tuple, list)) else (out,):
                for tensor in leaf if isinstance(leaf, list) else (leaf,):
                    if isinstance(tensor, Tensor):
                        self.add(tensor)
        return out


@contextlib.contextmanager
def counting(*modules: nn.Module, part: Callable[[], str] | None = None) -> Iterator[MemoryLedger]:
    """Make all tensors created inside fake, and count them; the modules' tensors come first."""
    with FakeTensorMode(), _rows_are_not_packed():
        for module in modules:
            _make_fake(module)
        with MemoryLedger(part) as ledger:
            for module in modules:
                for tensor in (*module.parameters(), *module.buffers()):
                    ledger.add(tensor)
            yield ledger


def _make_fake(model: nn.Module) -> None:
    """Replace meta tensors by fake CPU tensors; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        own = (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for name, tensor in itertools.chain.from_iterable(map(list, own)):
            if id(tensor) not in made:
                fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                if isinstance(tensor, nn.Parameter):
                    fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                made[id(tensor)] = fake
            setattr(module, name, made[id(tensor)])


@contextlib.contextmanager
def _rows_are_not_packed() -> Iterator[None]:
    """Keep transformers from making a mask for packed rows.

    It makes none for rows whose positions begin at 0. But fake positions have no values, so it
    would assume packed rows, and their mask, (B, 1, T, T), would be the largest tensor of all.
    """
    name = "find_packed_sequence_indices"
    before = getattr(masking_utils, name, None)
    if before is None:  # this release does not look for packed rows, or not here
        yield
        return
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, before)
