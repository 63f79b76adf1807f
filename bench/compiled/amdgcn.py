"""Instructions per logit on an AMD GPU, counted in the text of its assembly, not executed.

For each loop the instructions of its body are divided by the logits that a lane handles in one
iteration; for a kernel that holds its row, all instructions are counted. (sass.py is for NVIDIA.)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


class Instruction(NamedTuple):
    """An instruction: its position, its name, and where it may branch to."""

    at: int
    opcode: str
    target: int | None


def amdgcn_of(text: str) -> list[Instruction]:
    """Return the instructions of AMD assembly; a position is the instruction's number."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in text.rpartition("s_endpgm")[0].splitlines():  # the last: a row may end early
        if match := re.match(r"(\.?L\w+):", line):
            labels[match[1]] = len(found)
        elif match := re.match(r"\s+([sv]_\w+|(?:global|buffer|flat|ds)_\w+)\s*(\S*)", line):
            if "branch" in match[1]:
                branches.append((len(found), match[2]))
            found.append(Instruction(len(found), match[1], None))
    for n, label in branches:
        found[n] = found[n]._replace(target=labels[label])
    return found


def loops_of(code: Sequence[Instruction]) -> list[Sequence[Instruction]]:
    """Return the outermost loops, each from a label to the last branch back to it."""
    numbers = {instruction.at: n for n, instruction in enumerate(code)}
    spans: list[tuple[int, int]] = []
    for n, instruction in enumerate(code):
        start = numbers.get(-1 if instruction.target is None else instruction.target, n + 1)
        if start <= n:
            while spans and spans[-1][1] >= start:  # a part of this one, or it of them
                start = min(start, spans.pop()[0])
            spans.append((start, n))
    return [code[start : end + 1] for start, end in spans]


def amdgcn_per_logit(code: Sequence[Instruction], per_lane: float, held: bool) -> Counter[str]:
    """Return vector instructions per logit, packed ones counted once, and transcendental ones."""
    found: Counter[str] = Counter()
    for body in [code] if held else loops_of(code):
        if not any("_load_" in instruction.opcode for instruction in body):
            continue  # this loop writes zeros, in a row without loss
        for instruction in body:
            if instruction.opcode.startswith("v_"):
                found["vector"] += 1
            if re.match(r"v_(exp|log|rcp|rsq|sqrt)_", instruction.opcode):
                found["transcendental"] += 1
    return Counter({what: count / per_lane for what, count in found.items()})
