"""Run all threads of some blocks step by step, with their warps in a given order.

In "lockstep" every warp executes an instruction before any warp continues to the next; in the other
orders each warp runs alone from barrier to barrier, the last one first ("reversed") or in a random
order. Races are found in any order; the order only decides which value remains.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from . import accesses
from .arithmetic import FLOATS, SIGNED, UNSIGNED, Array, flush
from .counting import Counts
from .lanes import NO_NOISE, Lanes, Noise
from .memory import Fault, Memory
from .operations import operation
from .program import (
    Instruction,
    Number,
    Operand,
    Program,
    Register,
    Special,
    Symbol,
    Unsupported,
    Vector,
)
from .races import WARP, Race, Watch

Order = Literal["lockstep", "reversed", "random"]
Step = Callable[[Lanes], None]
Read = Callable[[Lanes], Array]
_POISON = 0x7FC07FC07FC07FC0  # a NaN in every format, for registers that were never written
_STEPS = 20_000_000  # of one group of warps between two barriers; more means an endless loop


class Machine:
    """A program with its arguments, its memory and what was observed while it ran."""

    def __init__(
        self,
        program: Program,
        arguments: Sequence[int | float],
        memory: Memory,
        *,
        shared: int,
        noise: Noise | None = None,
        counting: bool = False,
    ) -> None:
        """Decode the program.

        Args:
            program: a kernel.
            arguments: of the kernel, in order; addresses as numbers.
            memory: the global memory.
            shared: bytes of shared memory of a block.
            noise: errors of approximate instructions; without it there are none.
            counting: whether sectors and conflicts are counted, which doubles the time.
        """
        self.program, self.memory, self.noise = program, memory, noise
        self.shared_size, self.shared_room = shared, -(-max(shared, 1) // 128) * 128
        self.shared = memory  # replaced for each group of blocks
        self.counts, self.counting = Counts(), counting
        self.params = {
            name: _bits(value, kind)
            for (name, kind), value in zip(program.params, arguments, strict=True)
        }
        self._slots: dict[str, int] = {}
        self._empty: list[Any] = []
        self._executed = np.zeros(len(program.code), np.int64)
        self._steps = [self._decode(pc) for pc in range(len(program.code))]
        units = {space: 4 for space in ("global", "shared")}
        for i in program.code:
            if form := accesses.form_of(i.opcode):
                units[form.space] = min(units[form.space], form.width)
        self._units = units
        self._lines = [i.line for i in program.code]
        self._watch = Watch(memory, units["global"], program.threads, self._lines)
        self._shared_races: set[Race] = set()

    @property
    def races(self) -> set[Race]:
        """Return all races that were found."""
        return self._watch.found | self._shared_races

    # decoding, before the program runs

    def _decode(self, pc: int) -> Step | None:
        i = self.program.code[pc]
        name = i.opcode.split(".")[0]
        if name in ("bra", "ret"):
            return None
        if name in ("bar", "barrier"):
            self._check_barrier(i)
            return None
        if i.opcode == "nop":
            return lambda lanes: None
        if (step := accesses.decode(self, pc, i)) is not None:
            return step
        if name == "mov" and any(isinstance(x, Vector) for x in i.operands):
            return self._packed(i)
        if not i.operands or not isinstance(i.operands[0], Register):
            raise Unsupported(f"operands of {i}")
        op = operation(i.opcode, len(i.operands) - 1)
        sources = [
            self.reader(x, kind, op.loose)
            for x, kind in zip(i.operands[1:], op.sources, strict=True)
        ]
        write = self.writer(i, i.operands[0], op.result, op.loose)
        function, noise = op.function, self.noise or NO_NOISE
        if op.error:

            def approximate(lanes: Lanes) -> None:
                values = [read(lanes) for read in sources]
                values = list(map(flush, values)) if op.flushes else values
                value = noise(function(*values), op.error, values)
                write(lanes, flush(value) if op.flushes else value)

            return approximate

        def compute(lanes: Lanes) -> None:
            write(lanes, function(*[read(lanes) for read in sources]))

        return compute

    def slot(self, register: Register) -> int:
        """Return the index of a register's value."""
        if register.name not in self._slots:
            bits = self.program.width(register)
            self._slots[register.name] = len(self._empty)
            poison = UNSIGNED[max(bits, 8)](_POISON & (1 << bits) - 1)
            self._empty.append(np.bool_(False) if bits == 1 else poison)
        return self._slots[register.name]

    def reader(self, operand: Operand | None, kind: str, loose: bool = False) -> Read:
        """Return a function that reads an operand; if `loose`, its register may be wider."""
        bits = 1 if kind == "pred" else int(kind[1:])
        if isinstance(operand, Register):
            slot, width = self.slot(operand), self.program.width(operand)
            if width == bits == 1:
                return lambda lanes: lanes.registers[slot]
            dtype = _dtype(kind)
            if width == bits:
                return lambda lanes: lanes.registers[slot].view(dtype)
            if loose and width > bits:
                narrow = UNSIGNED[bits]
                return lambda lanes: lanes.registers[slot].astype(narrow).view(dtype)
            raise Unsupported(f"a register of {width} bits as {kind}")
        if isinstance(operand, Number):
            if operand.floats not in (0, bits) or (kind[0] == "f" and operand.floats != bits):
                raise Unsupported(f"{operand} as {kind}")
            if kind == "pred":
                truth = np.bool_(operand.value)
                return lambda lanes: truth
            value = operand.value - (operand.value >= 1 << 63) * (1 << 64)  # they have 64 bits
            if not -(1 << bits - 1) <= value < 1 << bits:
                raise Unsupported(f"{operand.value} in {bits} bits")
            number = UNSIGNED[bits](operand.value & (1 << bits) - 1).view(_dtype(kind))
            return lambda lanes: number
        if isinstance(operand, Symbol) and operand.name == "global_smem":
            address = UNSIGNED[bits](operand.offset).view(_dtype(kind))
            return lambda lanes: address
        if isinstance(operand, Special) and bits == 32:
            return self._special(operand.name)
        raise Unsupported(f"operand {operand} as {kind}")

    def _special(self, name: str) -> Read:
        known: dict[str, Read] = {
            "ctaid.x": lambda lanes: lanes.block,
            "tid.x": lambda lanes: lanes.tid,
            "laneid": lambda lanes: lanes.tid % np.uint32(WARP),
            "warpid": lambda lanes: lanes.tid // np.uint32(WARP),
            "ntid.x": lambda lanes: np.uint32(self.program.threads),
        }
        if name not in known:
            raise Unsupported(f"%{name}")
        return known[name]

    def writer(
        self, i: Instruction, register: Operand, kind: str, loose: bool = False
    ) -> Callable[[Lanes, Array], None]:
        """Return a function that writes a value to a register where the predicate is true."""
        if not isinstance(register, Register):
            raise Unsupported(f"{i} writes to {register}")
        slot, width = self.slot(register), self.program.width(register)
        bits = 1 if kind == "pred" else int(kind[1:])
        dtype = np.dtype(bool if kind == "pred" else _dtype(kind))
        raw = np.dtype(bool) if bits == 1 else np.dtype(UNSIGNED[width])
        if width != bits and not (loose and 1 < bits < width):
            raise Unsupported(f"{i}: {kind} in a register of {width} bits")
        wide = (SIGNED if kind[0] == "s" else UNSIGNED).get(width)
        if i.predicate is not None:
            self.slot(Register(i.predicate))

        def write(lanes: Lanes, value: Array) -> None:
            if value.dtype != dtype and value.dtype.itemsize != dtype.itemsize:
                raise TypeError(f"{i} made {value.dtype} for {dtype}")
            if width != bits:  # signed numbers keep their sign in a wider register
                value = value.view(dtype).astype(wide)
            if value.dtype != raw:
                value = value.view(raw)
            taken = self.taken(lanes, i)
            if taken is not None:
                value = np.where(taken, value, lanes.registers[slot])
            lanes.registers[slot] = value

        return write

    def taken(self, lanes: Lanes, i: Instruction) -> Array:
        """Return the lanes that execute an instruction, or None for all."""
        if i.predicate is None:
            return lanes.mask
        p = lanes.registers[self._slots[i.predicate]]
        p = ~p if i.negated else p
        return p if lanes.mask is None else p & lanes.mask

    def _packed(self, i: Instruction) -> Step:
        """Decode a mov between a register and parts of it."""
        bits = int(i.opcode.removeprefix("mov.b"))
        to, source = i.operands
        if isinstance(source, Vector):
            part = bits // len(source.parts)
            readers = [self.reader(x, f"b{part}") for x in source.parts]
            write = self.writer(i, to, f"b{bits}")
            wide = UNSIGNED[bits]

            def pack(lanes: Lanes) -> None:
                total = wide(0)
                for n, read in enumerate(readers):
                    total = total | read(lanes).astype(wide) << wide(part * n)
                write(lanes, total)

            return pack
        if not isinstance(to, Vector):
            raise Unsupported(str(i))
        part = bits // len(to.parts)
        read = self.reader(source, f"b{bits}")
        writers = [
            (n, self.writer(i, x, f"b{part}")) for n, x in enumerate(to.parts) if x is not None
        ]

        def unpack(lanes: Lanes) -> None:
            value = read(lanes)
            for n, write in writers:
                write(lanes, (value >> UNSIGNED[bits](part * n)).astype(UNSIGNED[part]))

        return unpack

    # running

    def run(self, blocks: Iterable[int], order: Order = "lockstep", seed: int = 0) -> None:
        """Run some blocks at a time."""
        given = np.array(list(blocks), np.uint32)
        threads = self.program.threads
        warps = range(0, threads, WARP)
        spans = [range(threads)] if order == "lockstep" else [range(w, w + WARP) for w in warps]
        groups = []
        for span in spans:
            tid = np.tile(np.array(span, np.uint32), len(given))
            slot = np.repeat(np.arange(len(given), dtype=np.uint32), len(span))
            groups.append(Lanes(tid, given[slot], slot, threads))
            groups[-1].registers = list(self._empty)
        rng = np.random.default_rng(seed)
        pick: Callable[[int], Iterable[int]] = {
            "lockstep": range,
            "reversed": lambda n: range(n - 1, -1, -1),
            "random": rng.permutation,
        }[order]
        room = np.zeros(len(given) * self.shared_room, np.uint8)
        self.shared = Memory("shared", {0: room}, written=False)
        watch = Watch(self.shared, self._units["shared"], threads, self._lines)
        with np.errstate(all="ignore"):
            self._run(groups, pick, watch, len(given))
        self._shared_races |= watch.found
        self.counts.executed.update({pc: n for pc, n in enumerate(self._executed.tolist()) if n})
        self._executed[:] = 0

    def _run(self, groups: list[Lanes], pick: Any, watch: Watch, blocks: int) -> None:
        while True:
            for n in pick(len(groups)):
                if not groups[n].done:
                    self._to_barrier(groups[n])
            self._watch.end_interval(across_blocks=True)
            watch.end_interval(across_blocks=False)
            if all(lanes.done for lanes in groups):
                return
            if any(lanes.done for lanes in groups) or len({lanes.pc for lanes in groups}) > 1:
                raise Fault("some warps wait at a barrier that others do not reach")
            self.counts.barriers += blocks

    def _to_barrier(self, lanes: Lanes) -> None:
        code, steps, executed = self.program.code, self._steps, self._executed
        warps = len(lanes.tid) // WARP
        pc = lanes.pc
        for _ in range(_STEPS):
            if lanes.apart is not None:
                # Those furthest behind step; where the branches join, they meet the others.
                pc = int(lanes.apart.min())
                lanes.mask = lanes.apart == pc
                if lanes.mask.all():
                    lanes.apart = lanes.mask = None
            mask, step = lanes.mask, steps[pc]
            executed[pc] += warps if mask is None else int(mask.reshape(-1, WARP).any(axis=1).sum())
            if step is not None:
                try:
                    step(lanes)
                except Fault as fault:
                    raise Fault(f"{code[pc]}: {fault}") from None
                pc += 1
                if mask is not None:
                    lanes.apart[mask] = pc
                continue
            if code[pc].opcode in ("bra", "bra.uni"):
                pc = self._branch(lanes, pc)
            elif mask is not None:
                raise Fault(f"threads that are apart meet {code[pc]}")
            elif self._is_end(code[pc]):
                lanes.done = True
                return
            else:
                lanes.pc = pc + 1
                return
        raise Fault("a loop without an end")

    def _branch(self, lanes: Lanes, pc: int) -> int:
        """Continue at the label, at the next instruction, or, with diverged lanes, at both."""
        i = self.program.code[pc]
        (label,) = i.operands
        if not isinstance(label, Symbol):
            raise Unsupported(f"{i} to {label}")
        to = self.program.labels[label.name]
        taken = self.taken(lanes, i)
        if lanes.mask is None:
            if taken is None or taken.all():
                return to
            if not taken.any():
                return pc + 1
            lanes.apart = np.where(lanes.full(taken), to, pc + 1)
            return pc
        mask = lanes.mask
        lanes.apart = np.where(mask, np.where(taken, to, pc + 1), lanes.apart)
        return pc

    def _is_end(self, i: Instruction) -> bool:
        """Tell whether this is the end of the program and not a barrier."""
        if i.predicate is not None:
            raise Unsupported(f"{i} with a predicate")
        return i.opcode == "ret"

    def _check_barrier(self, i: Instruction) -> None:
        """Refuse any barrier other than that of the whole block."""
        names = ("bar.sync", "barrier.sync", "barrier.sync.aligned", "barrier.cta.sync")
        numbers = tuple(x.value for x in i.operands if isinstance(x, Number))
        whole = [(0,), (0, self.program.threads)]
        if i.opcode not in (*names, "barrier.cta.sync.aligned") or numbers not in whole:
            raise Unsupported(f"{i} of {numbers}")


@functools.cache
def _dtype(kind: str) -> Any:
    letter, bits = kind[0], int(kind[1:])
    return {"f": FLOATS, "s": SIGNED}.get(letter, UNSIGNED)[bits]


def _bits(value: float, kind: str) -> Array:
    """Return an argument as an unsigned number of its width."""
    bits = int(kind[1:])
    if kind[0] == "f":
        return FLOATS[bits](value).view(UNSIGNED[bits])
    return UNSIGNED[bits](int(value) & (1 << bits) - 1)
