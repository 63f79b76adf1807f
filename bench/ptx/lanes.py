"""Threads that step together, and the errors of their approximate instructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .arithmetic import Array


class Lanes:
    """Some warps that step together.

    Attributes:
        tid: (n,) index of the thread in its block.
        block: (n,) index of the block in the grid.
        slot: (n,) index of the block among those that run at the same time.
        thread: (n,) index of the thread in the grid.
        of_a_block: how many of the threads belong to each block.
        registers: by their number; a scalar is one value for all threads.
        apart: (n,) where each thread is in the program, while they have diverged.
        mask: (n,) the threads that step, while they have diverged.
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
        """Return a value as an array of shape (n,)."""
        return np.broadcast_to(value, self.tid.shape)


class Noise:
    """Errors of approximate instructions: as large as allowed, and equal for equal operands."""

    def __init__(self, seed: int) -> None:
        """Take a seed: 0 rounds the exact result, 1 makes all too large, -1 all too small."""
        self.seed = seed

    def __call__(self, exact: Array, error: float, sources: Sequence[Array]) -> Array:
        """Return float64 results as float32, with errors added."""
        if not self.seed:
            return exact.astype(np.float32)
        mixed = np.uint64(abs(self.seed))
        for n, source in enumerate(sources):
            bits = np.asarray(source).view(np.uint32).astype(np.uint64)
            mixed = (mixed ^ bits) * np.uint64(0x9E3779B97F4A7C15 + 2 * n)
        sign = (mixed >> np.uint64(37) & np.uint64(1)).astype(np.float64) * 2 - 1
        sign = float(self.seed) if abs(self.seed) == 1 else sign
        moved = exact * (1 + (error - 2.0**-24) * sign)  # less what the rounding may add
        return np.where(np.asarray(sources[0]) == 0, exact, moved).astype(np.float32)  # 2^0 is 1


NO_NOISE = Noise(0)
