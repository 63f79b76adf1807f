"""Find races: two threads at one address, one writing, with no barrier between the accesses.

There are no barriers between blocks. A race is found in any order of execution, even if its effect
does not show in this one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .arithmetic import UNSIGNED, Array
from .memory import Access, Memory

WARP = 32


class Touch(NamedTuple):
    """One side of a race."""

    pc: int
    line: int
    what: str  # "read" or "write"


class Race(NamedTuple):
    """What two threads do at one address.

    Attributes:
        space: "global" or "shared".
        scope: what the threads share: "lanes" of a warp, "warps" of a block, or "blocks".
        first: one side.
        second: the other side; it may be the same instruction.
        same: both write the same value, so the memory does not depend on which is last.
    """

    space: str
    scope: str
    first: Touch
    second: Touch
    same: bool

    def __str__(self) -> str:
        sides = " and ".join(f"a {side.what} of line {side.line}" for side in self[2:4])
        which = "one instruction: " if self.first.pc == self.second.pc else ""
        value = "the same value" if self.same else "a race"
        return f"{self.space}, {self.scope}: {which}{sides}, {value}"


class _Touches(NamedTuple):
    """The accesses of an interval, by unit of memory."""

    units: Array
    thread: Array
    pc: Array
    writes: Array
    value: Array


class Watch:
    """Finds the races of one memory: between two barriers, and between blocks over the launch."""

    def __init__(self, memory: Memory, unit: int, threads: int, lines: list[int]) -> None:
        """Start with nothing touched.

        Args:
            memory: the memory whose log is read.
            unit: bytes that are checked together, at most the width of the narrowest access.
            threads: the number in a block.
            lines: of the source, by pc.
        """
        self.memory, self.unit, self.threads, self.lines = memory, unit, threads, lines
        self.found: set[Race] = set()
        size = len(memory.bytes) // unit
        # for each unit, 1 + the block that read or wrote it; -1 for several readers
        self._reader, self._writer = np.zeros(size, np.int32), np.zeros(size, np.int32)

    def end_interval(self, *, across_blocks: bool) -> None:
        """Check the accesses since the last call; every thread is at a barrier."""
        log, self.memory.log = self.memory.log, []
        if not log or not (across_blocks or any(access.writes for access in log)):
            return
        touches = self._touches(log)
        if across_blocks:
            self._judge_blocks(touches)
        self._judge_interval(touches)

    def _touches(self, log: list[Access]) -> _Touches:
        columns: list[tuple[Array, ...]] = []
        dtype = UNSIGNED[8 * self.unit]
        for access in log:
            count = access.width // self.unit
            units = access.offsets[:, None] // self.unit + np.arange(count)
            shape = units.shape
            value = access.values.view(dtype) if access.writes else np.zeros(shape, dtype)
            thread = np.broadcast_to(access.threads[:, None], shape)
            same = np.full(units.size, access.pc), np.full(units.size, access.writes)
            columns.append((units.reshape(-1), thread.reshape(-1), *same, value.reshape(-1)))
        return _Touches(*map(np.concatenate, zip(*columns, strict=True)))

    def _judge_interval(self, t: _Touches) -> None:
        written = np.zeros(len(self._writer), bool)
        written[t.units[t.writes]] = True
        on = written[t.units]
        if not on.any():
            return
        units, thread, pc, writes, value = (x[on] for x in t)
        order = np.argsort(units, kind="stable")
        units, thread, pc, writes, value = (x[order] for x in (units, thread, pc, writes, value))
        starts = np.flatnonzero(np.r_[True, units[1:] != units[:-1]])
        ends = np.r_[starts[1:], len(units)]

        def spread(x: Array) -> tuple[Array, Array]:
            return np.minimum.reduceat(x, starts), np.maximum.reduceat(x, starts)

        low, high = spread(thread)
        bad = low != high
        if not bad.any():
            return
        all_write = np.minimum.reduceat(writes, starts)
        least, most = spread(value)
        same = all_write & (least == most)
        key = np.stack([*spread(pc), same, all_write, low // WARP != high // WARP])[:, bad]
        _, chosen = np.unique(key, axis=1, return_index=True)  # one unit for each kind of race
        for n in np.flatnonzero(bad)[chosen].tolist():
            on = slice(starts[n], ends[n])
            self._report(thread[on], pc[on], writes[on], bool(same[n]))

    def _report(self, thread: Array, pc: Array, writes: Array, same: bool) -> None:
        """Add each pair of instructions with which two different threads accessed this unit."""
        sides = sorted({(int(p), bool(w)) for p, w in zip(pc, writes, strict=True)})
        for i, first in enumerate(sides):
            for second in sides[i:]:
                if not (first[1] or second[1]):
                    continue
                a = np.unique(thread[(pc == first[0]) & (writes == first[1])])
                b = np.unique(thread[(pc == second[0]) & (writes == second[1])])
                a, b = (x.reshape(-1) for x in np.meshgrid(a, b))
                if not (a != b).any():
                    continue
                a, b = a[a != b], b[a != b]
                scope = "lanes"
                if (a // self.threads != b // self.threads).any():
                    scope = "blocks"
                elif (a // WARP != b // WARP).any():
                    scope = "warps"
                self._add(scope, first, second, same)

    def _add(
        self, scope: str, first: tuple[int, bool], second: tuple[int, bool], same: bool
    ) -> None:
        a, b = (Touch(pc, self.lines[pc], "write" if w else "read") for pc, w in (first, second))
        self.found.add(Race(self.memory.name, scope, a, b, same))

    def _judge_blocks(self, t: _Touches) -> None:
        """Record which blocks accessed what, and what one block wrote and another accessed."""
        block = (t.thread // self.threads + 1).astype(np.int32)
        before = self._writer[t.units]
        reads = ~t.writes
        at, by = t.units[reads], block[reads]
        seen = self._reader[at]
        self._reader[at] = np.where((seen == 0) | (seen == by), by, -1)
        self._reader[at[(self._reader[at] != by)]] = -1  # two blocks in this interval
        at, by = t.units[t.writes], block[t.writes]
        self._writer[at] = by
        writer, reader = self._writer[t.units], self._reader[t.units]
        other_wrote = ((before != 0) & (before != block)) | ((writer != 0) & (writer != block))
        other_read = t.writes & (reader != 0) & (reader != block)
        for bad, what in ((other_wrote, True), (other_read, False)):
            for pc in np.unique(t.pc[bad]).tolist():
                writes = bool(t.writes[bad & (t.pc == pc)].any())
                self.found.add(self._between_blocks(pc, writes, what))

    def _between_blocks(self, pc: int, writes: bool, other_writes: bool) -> Race:
        """Return a race with another block, of which only the kind of access is known."""
        mine = Touch(pc, self.lines[pc], "write" if writes else "read")
        other = Touch(-1, 0, "write" if other_writes else "read")
        return Race(self.memory.name, "blocks", mine, other, same=False)
