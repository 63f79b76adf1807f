"""Count what a launch executed: warp instructions, bytes, 32-byte sectors, bank conflicts."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .arithmetic import Array
from .program import Program
from .races import WARP

SECTOR, LINE = 32, 128  # bytes: what memory moves, and what a cache looks up
BANKS, BANK = 32, 4  # shared memory: the number of banks, and the bytes of each

# The kinds of instruction that are counted separately, with their opcodes.
KINDS = {
    "ex2": r"(ex2|lg2|rcp|sqrt|rsqrt|tanh)\..*",
    "div": r"div\..*",
    "fma": r"fma\..*",
    "add, mul": r"(add|sub|mul|neg|abs|copysign)\..*f(32|64|32x2)(\.b?f16)?",
    "max": r"(max|min)\..*f32",
    "compare": r"(setp|selp)\..*",
    "convert": r"cvta?\..*",
    "shuffle": r"(shfl|redux)\..*",
    "global": r"(ld|st)\.global.*",
    "shared": r"((ld|st)(matrix)?)\..*shared.*",
    "barrier": r"(bar|barrier)\..*",
    "branch": r"(bra|ret)(\..*)?",
    "move": r"(mov|ld\.param)\..*",
    "integer": r"(add|sub|mul|mad|min|max|neg|abs|div|rem)\..*[su](16|32|64)"
    r"|(and|or|xor|not|shl|shr|bfe|bfi|prmt|lop3|popc|clz)\..*",
}


def kind_of(opcode: str) -> str:
    """Return the kind of an instruction."""
    for kind, pattern in KINDS.items():
        if re.fullmatch(pattern, opcode):
            return kind
    raise ValueError(f"{opcode} is of no kind")


@dataclass
class Counts:
    """Counts for each instruction, by its position; a warp that executes it counts once.

    Attributes:
        executed: how often a warp executed it.
        active: how often with at least one lane for which the predicate is true.
        bytes: requested by those lanes; bytes that several lanes of a warp request count once.
        sectors: of global memory with these bytes, counted for each warp.
        fetched: the same, counted once for warps that step together: what a cache does not serve.
        lines: of 128 bytes, counted for each warp.
        conflicts: passes over shared memory beyond those that the width needs.
        barriers: that a block waited at.
    """

    executed: Counter[int] = field(default_factory=Counter)
    active: Counter[int] = field(default_factory=Counter)
    bytes: Counter[int] = field(default_factory=Counter)
    sectors: Counter[int] = field(default_factory=Counter)
    fetched: Counter[int] = field(default_factory=Counter)
    lines: Counter[int] = field(default_factory=Counter)
    conflicts: Counter[int] = field(default_factory=Counter)
    barriers: int = 0

    def access(
        self, pc: int, space: str, addresses: Array, active: Array, width: int, together: int
    ) -> None:
        """Count one access by (lanes,) addresses and active lanes, `together` lanes per block."""
        at, on = addresses.reshape(-1, WARP), active.reshape(-1, WARP)
        self.active[pc] += int(on.any(axis=1).sum())
        self.bytes[pc] += _distinct(at, on) * width
        if space == "global":
            self.sectors[pc] += _distinct(at // SECTOR, on)
            self.lines[pc] += _distinct(at // LINE, on)
            block = addresses.reshape(-1, together), active.reshape(-1, together)
            self.fetched[pc] += _distinct(block[0] // SECTOR, block[1])
        else:
            self.conflicts[pc] += _conflicts(at, on, width)

    def by_kind(self, program: Program) -> Counter[str]:
        """Return the number of instructions of each kind."""
        found: Counter[str] = Counter()
        for pc, times in self.executed.items():
            opcode = program.code[pc].opcode
            if opcode != "nop":
                found[kind_of(opcode)] += times
        return found


def _distinct(values: Array, on: Array) -> int:
    """Return the number of distinct values in each row where `on`, summed over the rows."""
    values = np.sort(np.where(on, values, -1), axis=1)
    new = np.c_[np.ones(len(values), bool), values[:, 1:] != values[:, :-1]]
    return int((new & (values >= 0)).sum())


def _conflicts(at: Array, on: Array, width: int) -> int:
    """Return the passes beyond one per 128 bytes; lanes that access the same word share one."""
    per_pass = WARP if width <= BANK else LINE // width
    found = 0
    for start in range(0, WARP, per_pass):
        words = np.arange(max(1, width // BANK))
        cells = at[:, start : start + per_pass, None] // BANK + words
        some = np.repeat(on[:, start : start + per_pass, None], len(words), axis=2)
        for row, mask in zip(cells, some, strict=True):
            distinct = np.unique(row[mask])
            if len(distinct):
                found += int(np.bincount(distinct % BANKS).max()) - 1
    return found
