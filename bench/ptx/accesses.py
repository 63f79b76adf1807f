"""Instructions that access memory or other lanes: ld, st, ldmatrix, stmatrix, shfl and redux."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .arithmetic import SIGNED, UNSIGNED, Array, largest, or_nan, smallest
from .memory import Access, Fault, bytes_of
from .program import Address, Instruction, Number, Operand, Register, Symbol, Unsupported, Vector
from .races import WARP

if TYPE_CHECKING:
    from .machine import Lanes, Machine

Step = Callable[["Lanes"], None]
Read = Callable[["Lanes"], Array]


class Form(NamedTuple):
    """What a load or store accesses: its memory space, the number of elements and their bits."""

    space: str
    count: int
    kind: str

    @property
    def bits(self) -> int:
        """Return the bits of an element."""
        return int(self.kind[1:])

    @property
    def width(self) -> int:
        """Return the bytes that a thread accesses."""
        return self.count * self.bits // 8


# A load's hints to the caches have no effect here.
_ACCESS = re.compile(
    r"(?:ld|st)\.(global|shared)(?:::cta)?(?:\.L1::(?:evict_first|evict_last|no_allocate))?"
    r"(?:\.v([248]))?\.([busf](?:8|16|32|64))"
)
_MATRIX = re.compile(
    r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16"
)


def form_of(opcode: str) -> Form | None:
    """Return the form of an access, or None for another instruction."""
    if match := _ACCESS.fullmatch(opcode):
        return Form(match[1], int(match[2] or 1), match[3])
    return Form("shared", 8, "b16") if _MATRIX.fullmatch(opcode) else None


def decode(machine: Machine, pc: int, i: Instruction) -> Step | None:
    """Return a function that executes an instruction of this file, or None for any other."""
    name = i.opcode.split(".")[0]
    if i.opcode.startswith("ld.param."):
        return _load_param(machine, i)
    if match := _MATRIX.fullmatch(i.opcode):
        return _matrix(machine, pc, i, int(match[2]), transposed=match[3] is not None)
    if name in ("ld", "st"):
        form = form_of(i.opcode)
        if form is None:
            raise Unsupported(i.opcode)
        return _access(machine, pc, i, form)
    if name == "shfl":
        return _shuffle(machine, i)
    return _redux(machine, i) if name == "redux" else None


def _load_param(machine: Machine, i: Instruction) -> Step:
    to, address = i.operands
    kind = i.opcode.removeprefix("ld.param.")
    if not re.fullmatch(r"[busf](8|16|32|64)", kind) or not isinstance(address, Address):
        raise Unsupported(str(i))
    if not isinstance(address.base, Symbol) or address.offset:
        raise Unsupported(f"{i} from {address}")
    value = machine.params[address.base.name]
    if value.dtype.itemsize * 8 != int(kind[1:]):
        raise Unsupported(f"{i}: the parameter has {value.dtype.itemsize * 8} bits")
    write = machine.writer(i, to, kind, loose=True)
    value = value.view(SIGNED[int(kind[1:])]) if kind[0] == "s" else value
    return lambda lanes: write(lanes, value)


def _elements(operand: Operand, count: int, i: Instruction) -> tuple[Register | Number | None, ...]:
    parts = operand.parts if isinstance(operand, Vector) else (operand,)
    if len(parts) != count:
        raise Unsupported(f"{i} with {len(parts)} registers")
    return parts  # type: ignore[return-value]


def _addresses(machine: Machine, i: Instruction, operand: Operand, space: str) -> Read:
    if not isinstance(operand, Address):
        raise Unsupported(f"{i} at {operand}")
    kind, offset = "u64" if space == "global" else "u32", operand.offset
    read = machine.reader(operand.base, kind)
    return lambda lanes: lanes.full(read(lanes)).astype(np.int64) + offset


def _in_shared(machine: Machine, lanes: Lanes, at: Array, slots: Array, width: int) -> Array:
    """Return where a block's shared addresses are in the memory of all blocks."""
    if ((at < 0) | (at + width > machine.shared_size)).any():
        raise Fault(f"{int(at.max())} is out of bounds of {machine.shared_size} shared bytes")
    return at + slots.astype(np.int64) * machine.shared_room


def _access(machine: Machine, pc: int, i: Instruction, form: Form) -> Step:
    writes = i.opcode.startswith("st")
    if len(i.operands) != 2:
        raise Unsupported(f"{i} with {len(i.operands)} operands")
    where, what = i.operands if writes else i.operands[::-1]
    addresses = _addresses(machine, i, where, form.space)
    parts = _elements(what, form.count, i)
    bits, width, space = form.bits, form.width, form.space
    if writes:
        readers = [machine.reader(part, form.kind, loose=True) for part in parts]
    else:
        writers = [
            None if part is None else machine.writer(i, part, form.kind, loose=True)
            for part in parts
        ]
    raw = UNSIGNED[bits]
    dtype = SIGNED[bits] if form.kind[0] == "s" else raw
    if i.predicate is not None:
        machine.slot(Register(i.predicate))

    def access(lanes: Lanes) -> None:
        taken = machine.taken(lanes, i)
        at, thread, slots = addresses(lanes), lanes.thread, lanes.slot
        if machine.counting:
            active = np.ones(at.shape, bool) if taken is None else lanes.full(taken)
            machine.counts.access(pc, space, at, active, width, lanes.of_a_block)
        on: Array = None
        if taken is not None and not taken.all():
            on = lanes.full(taken)
            if not on.any():
                return
            at, thread, slots = at[on], thread[on], slots[on]
        memory = machine.memory if space == "global" else machine.shared
        if space == "shared":
            at = _in_shared(machine, lanes, at, slots, width)
        offsets = memory.locate(at, width)
        if writes:
            values = [lanes.full(read(lanes)).view(raw) for read in readers]
            values = values if on is None else [value[on] for value in values]
            memory.log.append(Access(pc, True, thread, offsets, width, bytes_of(values)))
            memory.store(offsets, values, bits)
            return
        memory.log.append(Access(pc, False, thread, offsets, width))
        for write, value in zip(writers, memory.load(offsets, form.count, bits), strict=True):
            if on is not None:  # inactive lanes keep their values: the writer takes care of that
                whole = np.zeros(on.shape, raw)
                whole[on] = value
                value = whole
            if write is not None:
                write(lanes, value.view(dtype))

    return access


def _whole_warps(machine: Machine, lanes: Lanes, i: Instruction) -> None:
    taken = machine.taken(lanes, i)
    if taken is not None:
        on = lanes.full(taken).reshape(-1, WARP)
        if (on.any(axis=1) != on.all(axis=1)).any():
            raise Fault("only some lanes of a warp reach it")


def _matrix(machine: Machine, pc: int, i: Instruction, count: int, *, transposed: bool) -> Step:
    """Decode a move of 8 x 8 matrices of 2 bytes.

    Lane 8 m + r has the address of row r of matrix m; each lane has two elements of each matrix.
    """
    writes = i.opcode.startswith("st")
    where, what = i.operands if writes else i.operands[::-1]
    addresses = _addresses(machine, i, where, "shared")
    parts = _elements(what, count, i)
    readers = [machine.reader(part, "b32") for part in parts] if writes else []
    writers = (
        [] if writes else [machine.writer(i, part, "b32") for part in parts if part is not None]
    )
    if not writes and len(writers) != count:
        raise Unsupported(f"{i} into _")
    lane = np.arange(WARP)
    row, column = lane // 4, 2 * (lane % 4)
    low, high = np.uint32(0xFFFF), np.uint32(16)

    def move(lanes: Lanes) -> None:
        _whole_warps(machine, lanes, i)
        if lanes.mask is not None:
            raise Unsupported(f"{i} by some warps only")
        at = addresses(lanes)
        speaks = np.tile(lane < 8 * count, len(at) // WARP)
        if machine.counting:
            machine.counts.access(pc, "shared", at, speaks, 16, lanes.of_a_block)
        at = _in_shared(machine, lanes, at[speaks], lanes.slot[speaks], 16)
        offsets = machine.shared.locate(at, 16)
        rows = offsets.reshape(-1, count, 8) // 2  # in elements
        cells = []
        for m in range(count):
            places = [
                rows[:, m, column + k] + row if transposed else rows[:, m, row] + column + k
                for k in (0, 1)
            ]
            cells.append([place.reshape(-1) * 2 for place in places])
        thread = lanes.thread[speaks]
        if writes:
            for (first, second), read in zip(cells, readers, strict=True):
                value = lanes.full(read(lanes))
                halves = (value & low).astype(np.uint16), (value >> high).astype(np.uint16)
                machine.shared.store(first, [halves[0]], 16)
                machine.shared.store(second, [halves[1]], 16)
            moved = bytes_of(machine.shared.load(offsets, 8, 16))
            machine.shared.log.append(Access(pc, True, thread, offsets, 16, moved))
            return
        machine.shared.log.append(Access(pc, False, thread, offsets, 16))
        for (first, second), write in zip(cells, writers, strict=True):
            halves = [machine.shared.load(place, 1, 16)[0] for place in (first, second)]
            write(lanes, halves[0].astype(np.uint32) | halves[1].astype(np.uint32) << high)

    return move


def _members(operand: Operand, i: Instruction, machine: Machine) -> Step:
    read = machine.reader(operand, "u32")

    def check(lanes: Lanes) -> None:
        if (read(lanes) != np.uint32(0xFFFFFFFF)).any():
            raise Unsupported(f"{i} for some lanes of a warp only")

    return check


def _shuffle(machine: Machine, i: Instruction) -> Step:
    match = re.fullmatch(r"shfl\.sync\.(bfly|idx|up|down)\.b32", i.opcode)
    if match is None or len(i.operands) != 5:
        raise Unsupported(f"{i} with {len(i.operands)} operands")
    to, source, by, clamp, members = i.operands
    if not isinstance(by, Number) or not isinstance(clamp, Number):
        raise Unsupported(f"{i} by {by}, {clamp}")
    if clamp.value != (0 if match[1] == "up" else WARP - 1):
        raise Unsupported(f"{i} within {clamp.value}")
    lane = np.arange(WARP)
    other = {
        "bfly": lane ^ by.value,
        "idx": np.full(WARP, by.value),
        "up": np.where(lane - by.value < 0, lane, lane - by.value),
        "down": np.where(lane + by.value >= WARP, lane, lane + by.value),
    }[match[1]] % WARP
    read, write = machine.reader(source, "b32"), machine.writer(i, to, "b32")
    check = _members(members, i, machine)

    def shuffle(lanes: Lanes) -> None:
        _whole_warps(machine, lanes, i)
        check(lanes)
        write(lanes, lanes.full(read(lanes)).reshape(-1, WARP)[:, other].reshape(-1))

    return shuffle


_REDUX = re.compile(
    r"redux\.sync\.(?:(add|min|max)\.([su]32)|(and|or|xor)\.(b32)|(min|max)(\.abs)?(\.NaN)?\.(f32))"
)


def _redux(machine: Machine, i: Instruction) -> Step:
    match = _REDUX.fullmatch(i.opcode)
    if match is None or len(i.operands) != 3:
        raise Unsupported(f"{i} with {len(i.operands)} operands")
    to, source, members = i.operands
    name, kind = match[1] or match[3] or match[5], match[2] or match[4] or match[8]
    function: Callable[[Array, Array], Array] = {
        "add": np.add, "min": np.minimum, "max": np.maximum,
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }[name]  # fmt: skip
    if kind == "f32":
        function = {"min": smallest, "max": largest}[name]
        function = or_nan(function) if match[7] else function
    read, write = machine.reader(source, kind), machine.writer(i, to, kind)
    check = _members(members, i, machine)

    def reduce(lanes: Lanes) -> None:
        _whole_warps(machine, lanes, i)
        check(lanes)
        value = lanes.full(read(lanes)).reshape(-1, WARP)
        value = np.abs(value) if match[6] else value
        while value.shape[1] > 1:
            half = value.shape[1] // 2
            value = function(value[:, :half], value[:, half:])
        write(lanes, np.repeat(value[:, 0], WARP))

    return reduce
