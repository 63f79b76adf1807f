"""Memory in pieces: each access must lie in one, be aligned, and read only what was written."""

from __future__ import annotations

import bisect
from typing import Any, NamedTuple

import numpy as np

from .arithmetic import UNSIGNED, Array

_SLACK = 32  # bytes after a piece, so that no two pieces touch


class Fault(RuntimeError):
    """An error in the program: an access out of bounds, a barrier that some threads never reach."""


class Access(NamedTuple):
    """The memory that the threads of one instruction accessed.

    Attributes:
        pc: position of the instruction.
        writes: whether it stores.
        threads: (n,) their indices in the whole grid.
        offsets: (n,) into the memory's bytes.
        width: bytes per thread.
        values: (n, width) uint8, what a store wrote.
    """

    pc: int
    writes: bool
    threads: Array
    offsets: Array
    width: int
    values: Array = None


class Memory:
    """An address space of which only some pieces exist, and the accesses since the last barrier."""

    def __init__(self, name: str, pieces: dict[int, Array], *, written: bool = True) -> None:
        """Copy the pieces.

        Args:
            name: of the space, for messages.
            pieces: the first address and the bytes of each; they may not overlap.
            written: whether their contents may be read.
        """
        self.name = name
        self.starts = sorted(pieces)
        sizes = [len(pieces[start]) for start in self.starts]
        self.ends = [start + size for start, size in zip(self.starts, sizes, strict=True)]
        if any(end > start for end, start in zip(self.ends, self.starts[1:], strict=False)):
            raise ValueError("pieces overlap")
        self.at = []  # where each piece is in `bytes`, at its address modulo 32
        total = 0
        for start, size in zip(self.starts, sizes, strict=True):
            self.at.append(total + start % 32)
            total += -(-(start % 32 + size) // 32) * 32 + _SLACK
        self.bytes = np.zeros(total, np.uint8)
        self._written = np.zeros(total, np.uint8)
        for at, start, size in zip(self.at, self.starts, sizes, strict=True):
            self.bytes[at : at + size] = pieces[start]
            self._written[at : at + size] = written
        self.log: list[Access] = []
        self._views = {bits: self.bytes.view(dtype) for bits, dtype in UNSIGNED.items()}
        self._marks = {bits: self._written.view(dtype) for bits, dtype in UNSIGNED.items()}
        self._tables = np.array(self.starts, np.int64), np.array(self.ends), np.array(self.at)

    def forget(self, start: int, size: int) -> None:
        """Treat a range as newly allocated: it must be written before it is read."""
        for at, begin, end in zip(self.at, self.starts, self.ends, strict=True):
            low, high = max(begin, start), min(end, start + size)
            if low < high:
                self._written[at + low - begin : at + high - begin] = 0

    def piece(self, start: int) -> Array:
        """Return the bytes of the piece that starts at an address."""
        n = self.starts.index(start)
        return self.bytes[self.at[n] : self.at[n] + self.ends[n] - start]

    def locate(self, addresses: Array, width: int) -> Array:
        """Return the offsets of accesses in `bytes`.

        Raises:
            Fault: one of them is misaligned, or not inside one piece.
        """
        if (addresses & (width - 1)).any():
            raise Fault(f"a misaligned access of {width} bytes")
        low, high = int(addresses.min()), int(addresses.max()) + width
        n = bisect.bisect_right(self.starts, low) - 1
        if n >= 0 and high <= self.ends[n]:
            return addresses + (self.at[n] - self.starts[n])
        starts, ends, at = self._tables
        piece = np.searchsorted(starts, addresses, "right") - 1
        inside = (piece >= 0) & (addresses + width <= ends[piece])
        if not inside.all():
            outside = int(addresses[~inside][0])
            raise Fault(f"{width} bytes at {outside:#x} are out of bounds{self._nearest(outside)}")
        return addresses + (at[piece] - starts[piece])

    def _nearest(self, address: int) -> str:
        n = bisect.bisect_right(self.starts, address) - 1
        if n < 0:
            return ""
        past = address - self.ends[n]
        return f", {f'{past} bytes' if past else 'just'} past what is there"

    def load(self, offsets: Array, count: int, bits: int) -> list[Array]:
        """Return the elements that some threads load, each (n,)."""
        at = offsets // (bits // 8)
        view, marks = self._views[bits], self._marks[bits]
        whole = int.from_bytes(b"\1" * (bits // 8))
        for n in range(count):
            if not (marks[at + n] == whole).all():
                raise Fault("a read of what nobody has written")
        return [view[at + n] for n in range(count)]

    def store(self, offsets: Array, values: list[Array], bits: int) -> None:
        """Write elements, each (n,); of several threads at one address the last one wins."""
        at = offsets // (bits // 8)
        view, marks = self._views[bits], self._marks[bits]
        whole = int.from_bytes(b"\1" * (bits // 8))
        for n, value in enumerate(values):
            view[at + n] = value
            marks[at + n] = whole


def bytes_of(values: list[Any]) -> Array:
    """Return elements of shape (n,) each as (n, width) uint8."""
    table = np.stack(values, axis=1)
    return table.view(np.uint8)
