"""PTX arithmetic that numpy lacks or defines differently: one rounding, flushed subnormals.

The functions take arrays and numpy's scalars. A NaN has numpy's bits and not PTX's, which only a
comparison of bits would show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any  # of numpy, or one of its scalars

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = {16: np.float16, 32: np.float32, 64: np.float64}
_SMALLEST = np.float32(2.0**-126)
_UP, _HALF, _ONE = np.uint32(16), np.uint32(0x7FFF), np.uint32(1)


def flush(x: Array) -> Array:
    """Replace float32 subnormals by zeros of the same sign."""
    return np.where(np.abs(x) < _SMALLEST, np.copysign(np.float32(0), x), x)


def fma(a: Array, b: Array, c: Array) -> Array:
    """Return a b + c of float32, rounded once.

    The product of two float32 is exact in float64. The sum is rounded to odd there: if it is not
    exact, the neighbour whose last bit is 1 is taken. So the later rounding to float32 still knows
    on which side of its midpoint the true sum lies.
    """
    product = np.multiply(a, b, dtype=np.float64)
    c = np.asarray(c, np.float64)
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)  # exact, by Knuth's two-sum
    bits = np.asarray(total).view(np.int64)
    to_odd = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    if to_odd.any():
        away = np.where((error > 0) == (total > 0), 1, -1)
        total = (bits + np.where(to_odd, away, 0)).view(np.float64)
    return total.astype(np.float32)


def largest(a: Array, b: Array) -> Array:
    """Return PTX's maximum: a number beats NaN, and +0 beats -0."""
    found = np.fmax(a, b)
    if np.all(found):
        return found
    zeros = (a == 0) & (b == 0)
    return np.where(
        zeros, np.where(np.signbit(a) & np.signbit(b), found.dtype.type(-0.0), 0), found
    )


def smallest(a: Array, b: Array) -> Array:
    """Return PTX's minimum: a number beats NaN, and -0 beats +0."""
    return -largest(-a, -b)


def or_nan(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """Return a maximum or minimum that a NaN beats."""

    def propagating(a: Array, b: Array) -> Array:
        return np.where(np.isnan(a) | np.isnan(b), np.float32("nan"), function(a, b))

    return propagating


def to_bfloat16(x: Array) -> Array:
    """Round float32 to bfloat16, to nearest even; return its bits."""
    bits = x.view(np.uint32)
    rounded = (bits + _HALF + (bits >> _UP & _ONE)) >> _UP
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def to_float16(x: Array) -> Array:
    """Round float32 to float16, to nearest even; return its bits."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def shifted(a: Array, by: Array, *, left: bool) -> Array:
    """Shift by any amount: beyond the width only the sign is left."""
    bits = a.dtype.itemsize * 8
    inside = np.minimum(by, np.uint32(bits - 1)).astype(a.dtype)
    if not left:
        moved = a >> inside
        if a.dtype.kind == "i":
            return moved
    else:
        moved = a << inside
    return np.where(by < bits, moved, a.dtype.type(0))


def field(a: Array, at: Array, length: Array) -> Array:
    """Return some bits of an uint32, as bfe.u32 does."""
    at, length = at & np.uint32(255), np.minimum(length & np.uint32(255), np.uint32(32))
    moved = shifted(a, at, left=False)
    mask = (np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)
    return moved & mask.astype(np.uint32)


def inserted(a: Array, b: Array, at: Array, length: Array) -> Array:
    """Return b with some of its bits replaced by the low bits of a, as bfi.b32 does."""
    at, length = at & np.uint32(255), np.minimum(length & np.uint32(255), np.uint32(32))
    mask = ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)).astype(np.uint32)
    mask = shifted(mask, at, left=True)
    return (shifted(a, at, left=True) & mask) | (b & ~mask)


def permuted(a: Array, b: Array, selector: Array) -> Array:
    """Pick four of the eight bytes of b and a, as prmt.b32 does in its default mode."""
    both = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
    found = np.uint64(0)
    for n in range(4):
        nibble = (selector >> np.uint32(4 * n) & np.uint32(15)).astype(np.uint64)
        byte = both >> (np.uint64(8) * (nibble & np.uint64(7))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where(nibble & np.uint64(8), sign, byte)
        found = found | byte << np.uint64(8 * n)
    return found.astype(np.uint32)


def looked_up(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Return any bitwise function of three operands, as lop3.b32 does."""
    found = np.uint32(0)
    for n in range(8):
        if int(table) >> n & 1:
            found = found | ((a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c))
    return found


def leading_zeros(a: Array) -> Array:
    """Count the zeros before the first one of an uint32."""
    return (np.uint32(32) - np.frexp(a.astype(np.float64))[1].astype(np.uint32)).astype(np.uint32)


def quotient(a: Array, b: Array) -> Array:
    """Divide integers, rounding towards zero; division by zero gives all ones, as on devices."""
    zero = b == 0
    whole = a // np.where(zero, b.dtype.type(1), b)
    if a.dtype.kind == "i":
        whole = whole + ((a % np.where(zero, b.dtype.type(1), b) != 0) & ((a < 0) != (b < 0)))
    return np.where(zero, a.dtype.type(-1) if a.dtype.kind == "i" else ~a.dtype.type(0), whole)


def by_halves(function: Callable[..., Array]) -> Callable[..., Array]:
    """Return the version of a float32 function for pairs of float32 in an uint64."""

    def paired(*values: Array) -> Array:
        halves = []
        for shift in (np.uint64(0), np.uint64(32)):
            floats = ((v >> shift).astype(np.uint32).view(np.float32) for v in values)
            halves.append(np.asarray(function(*floats)).view(np.uint32).astype(np.uint64))
        return halves[0] | halves[1] << np.uint64(32)

    return paired
