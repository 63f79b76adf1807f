"""The instructions that the GPUs' own assemblers made: how many a logit takes, and on which pipe.

Counted in the text of the code, not executed: of each loop its body, over the logits that a thread
takes in one round; of a code that holds its row, all of it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import triton

# Where an instruction of an NVIDIA GPU is executed, and how many results an SM makes in a clock: of
# compute capability 9.0, by the CUDA C++ Programming Guide (throughput of native arithmetic
# instructions), and taken for 10.0 too. Four schedulers issue an instruction of a warp each.
PER_CLOCK = {"issue": 128, "fma": 128, "alu": 64, "mufu": 16, "memory": 32}
_PIPES = {
    "mufu": r"MUFU",
    "fma": r"[FH](ADD|MUL|FMA)2?|FFMA2|IMAD|HFMA2|HADD2|HMUL2",
    "memory": r"(LD|ST)[GSLCT]?(SM)?|LDG|STG|LDS|STS|SHFL|ATOM[GS]?|RED|REDUX|CREDUX|LDSM|STSM",
    "control": r"BRA|EXIT|BSSY|BSYNC|NOP|WARPSYNC|BAR|CALL|RET|YIELD|DEPBAR|MEMBAR|ERRBAR|CCTL",
    "uniform": r"U[A-Z].*|R2UR|S2UR|LDCU",
}


class Instruction(NamedTuple):
    """An instruction: where it is, its name, and where it may branch to."""

    at: int
    opcode: str
    target: int | None


def sass_of(cubin: bytes) -> list[Instruction]:
    """Disassemble a cubin, up to the padding behind its end."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, "-sass", file.name], capture_output=True, text=True, check=True
        )
    found = []
    pattern = r"^\s+/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);"
    for match in re.finditer(pattern, done.stdout, re.M):
        to = re.findall(r"0x([0-9a-f]+)", match[3]) if match[2].startswith("BRA") else []
        target = int(to[-1], 16) if to else None
        found.append(Instruction(int(match[1], 16), match[2], target))
        if match[2] == "BRA" and target == found[-1].at:  # what follows the end
            found.pop()
            break
    if not found:
        raise ValueError("no instructions in the output of cuobjdump; its form has changed")
    return found


def amdgcn_of(text: str) -> list[Instruction]:
    """Return the instructions of an AMD code; places are their numbers."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in text.split("s_endpgm")[0].splitlines():
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
    """Return the outermost loops: what lies between a label and the last branch back to it."""
    numbers = {instruction.at: n for n, instruction in enumerate(code)}
    spans: list[tuple[int, int]] = []
    for n, instruction in enumerate(code):
        start = numbers.get(-1 if instruction.target is None else instruction.target, n + 1)
        if start <= n:
            while spans and spans[-1][1] >= start:  # a part of this one, or it of them
                start = min(start, spans.pop()[0])
            spans.append((start, n))
    return [code[start : end + 1] for start, end in spans]


def pipe_of(opcode: str) -> str:
    """Return where an instruction of SASS is executed."""
    name = opcode.split(".")[0]
    for pipe, pattern in _PIPES.items():
        if re.fullmatch(pattern, name):
            return pipe
    return "alu"


def sass_per_logit(code: Sequence[Instruction], per_thread: float, held: bool) -> Counter[str]:
    """Return the instructions of a logit on each pipe, and all as "issue"."""
    found: Counter[str] = Counter()
    for body in [code] if held else loops_of(code):
        for instruction in body:
            pipe = pipe_of(instruction.opcode)
            found["issue"] += 1
            found[pipe] += 2 if pipe == "fma" and re.match(r"F\w+2", instruction.opcode) else 1
    return Counter({pipe: count / per_thread for pipe, count in found.items()})


def amdgcn_per_logit(code: Sequence[Instruction], per_lane: float, held: bool) -> Counter[str]:
    """Return the vector instructions of a logit, packed ones once, and the transcendental ones."""
    found: Counter[str] = Counter()
    for body in [code] if held else loops_of(code):
        for instruction in body:
            if instruction.opcode.startswith("v_"):
                found["vector"] += 1
            if re.match(r"v_(exp|log|rcp|rsq|sqrt)_", instruction.opcode):
                found["transcendental"] += 1
    return Counter({what: count / per_lane for what, count in found.items()})
