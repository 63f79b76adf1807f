"""Threads that step together, and the errors of their approximate instructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .arithmetic import Array


class Lanes:
    """Some warps that step together.

    Attributes:
        tid: (n,) thread of the block.
        block: (n,) block of the grid.
        slot: (n,) which of the blocks that run at a time.
        thread: (n,) of the grid.
        of_a_block: how many there are of each block.
        registers: by their number; a scalar is one value for all.
        apart: (n,) where each is in the program, while they are not all at one place.
        mask: (n,) those that step, while they are apart.
    """

    def __init__(self, tid: Array, block: Array, slot: Array, threads: int) -> None:
        self.tid, self.block, self.slot = tid, block, slot
        self.thread = block.astype(np.int64) * threads + tid
        self.registers: list[Any] = []
        self.of_a_block = len(tid) // (int(slot.max()) + 1)
        self.pc, self.done = 0, False
        self.apart: Array = None
        self.mask: Array = None

    def full(self, value: Array) -> Array:
        """Return a value as (n,)."""
        return np.broadcast_to(value, self.tid.shape)


class Noise:
    """Errors of approximate instructions: the largest allowed, the same for the same operand."""

    def __init__(self, seed: int) -> None:
        """Take a seed: 0 rounds what is exact, 1 makes all too large, -1 all too small."""
        self.seed = seed

    def __call__(self, exact: Array, error: float, sources: Sequence[Array]) -> Array:
        """Return float32 of float64 results, with their errors."""
        if not self.seed:
            return exact.astype(np.float32)
        mixed = np.uint64(abs(self.seed))
        for n, source in enumerate(sources):
            bits = np.asarray(source).view(np.uint32).astype(np.uint64)
            mixed = (mixed ^ bits) * np.uint64(0x9E3779B97F4A7C15 + 2 * n)
        sign = (mixed >> np.uint64(37) & np.uint64(1)).astype(np.float64) * 2 - 1
        sign = float(self.seed) if abs(self.seed) == 1 else sign
        moved = exact * (1 + (error - 2.0**-24) * sign)  # what is left is for the rounding
        return np.where(np.asarray(sources[0]) == 0, exact, moved).astype(np.float32)  # 2^0 is 1


NO_NOISE = Noise(0)
