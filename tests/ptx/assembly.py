"""Small programs of PTX, written by hand and run."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from bench.ptx.machine import Machine
from bench.ptx.memory import Memory
from bench.ptx.program import Program, parse

IN, OUT = 0x10000, 0x20000  # addresses
_MODULE = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
  .param .u64 .ptr .global .align 1 given,
  .param .u64 .ptr .global .align 1 found,
  .param .s32 number
)
.reqntid {threads}
{{
  .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<40>; .reg .b64 %rd<20>;
  ld.param.b64 %rd0, [given];
  ld.param.b64 %rd1, [found];
  mov.u32 %r0, %tid.x;
  mul.wide.u32 %rd2, %r0, 8;
  add.s64 %rd3, %rd0, %rd2;
  add.s64 %rd4, %rd1, %rd2;
  {body}
  ret;
}}
"""
_REGISTERS = {16: "rs", 32: "r", 64: "rd"}


def program_of(body: str, threads: int = 32) -> Program:
    """Make a program whose %rd3 and %rd4 point to 8 bytes of each thread: `given` and `found`."""
    return parse(_MODULE.format(body=body, threads=threads))


def run(
    body: str,
    given: Any = (),
    *,
    threads: int = 32,
    blocks: int = 1,
    at_once: int = 64,
    order: Any = "lockstep",
    number: int = 0,
    shared: int = 1024,
    room: int = 64 * 8 * 32,
    **more: Any,
) -> tuple[np.ndarray, Machine]:
    """Run a body, and return the bytes of `found`, zeros where nothing was written."""
    raw = np.zeros(max(threads * 8, 1024), np.uint8)
    data = np.asarray(given)
    raw[: data.nbytes] = np.frombuffer(data.tobytes(), np.uint8)
    memory = Memory("global", {IN: raw, OUT: np.zeros(room, np.uint8)})
    machine = Machine(program_of(body, threads), [IN, OUT, number], memory, shared=shared, **more)
    for start in range(0, blocks, at_once):
        machine.run(range(start, min(start + at_once, blocks)), order)
    return machine.memory.piece(OUT).copy(), machine


def compute(opcode: str, kinds: str, *values: Any) -> np.ndarray:
    """Return what one instruction makes of arrays; kinds: the types of result and sources."""
    to, *sources = kinds.split()
    n = len(values[0])
    threads = -(-n // 32) * 32
    pieces = {IN: np.zeros(8 * threads, np.uint8)}
    lines = [f"setp.ge.u32 %p3, %r0, {n};", "@%p3 bra END;"]
    operands = []
    for place, (kind, value) in enumerate(zip(sources, values, strict=True)):
        bits, size = _bits(kind), value.dtype.itemsize
        assert 8 * size == bits, kind
        pieces[0x100000 * (place + 1)] = np.frombuffer(value.tobytes(), np.uint8)
        operands.append(f"%{_REGISTERS[bits]}{4 + place}")
        lines += [
            f"mov.u64 %rd10, {0x100000 * (place + 1)};",
            f"mad.wide.u32 %rd11, %r0, {size}, %rd10;",
            f"ld.global.b{bits} {operands[-1]}, [%rd11];",
        ]
    bits = 32 if to == "pred" else _bits(to)
    stored = f"%{_REGISTERS[bits]}1"
    result = "%p1" if to == "pred" else stored
    lines.append(f"{opcode} {', '.join([result, *operands])};")
    if to == "pred":
        lines.append(f"selp.b32 {stored}, 1, 0, %p1;")
    lines += [
        f"mad.wide.u32 %rd11, %r0, {bits // 8}, %rd0;",
        f"st.global.b{bits} [%rd11], {stored};",
    ]
    program = program_of("\n".join([*lines, "END:"]), threads)
    machine = Machine(program, [IN, OUT, 0], Memory("global", pieces), shared=0)
    machine.run([0])
    raw = machine.memory.piece(IN)[: n * bits // 8].copy()
    if to == "pred":
        return raw.view(np.uint32).astype(bool)
    return raw.view(np.dtype({"f": "f", "s": "i"}.get(to[0], "u") + str(bits // 8)))


def _bits(kind: str) -> int:
    return int(re.sub(r"\D", "", kind))
