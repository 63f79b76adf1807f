"""What each PTX opcode computes; one whose modifiers match no known form is an error."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import arithmetic as ar
from .program import Unsupported

Array = ar.Array
Function = Callable[..., Array]


class Operation(NamedTuple):
    """What an opcode does.

    Attributes:
        result: type of what it returns: pred, or b, u, s or f and the bits.
        sources: types of its operands.
        function: computes an array of type `result` from arrays of those types.
        loose: sources and result may be in wider registers, as for cvt.
        error: the largest relative error that the PTX manual allows, 0 if it is correctly rounded;
            otherwise `function` returns float64, which is rounded when the error is added.
        flushes: subnormals become zeros, unless `function` does that itself.
    """

    result: str
    sources: tuple[str, ...]
    function: Function
    loose: bool = False
    error: float = 0.0
    flushes: bool = False


# As relative errors. The PTX ISA (floating point instructions) has ex2.approx and div.full within 2
# units of the last place, rcp.approx and sqrt.approx within 1: a unit is 2^-23 of a number at most.
ERRORS = {
    "ex2": 2.0**-22,
    "div": 2.0**-22,
    "rcp": 2.0**-23,
    "sqrt": 2.0**-23,
    "lg2": 2.0**-22,
    "rsqrt": 2.0**-22,
    "tanh": 2.0**-11,
}

_COMPARE: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED_COMPARE = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_LOGIC: dict[str, Function] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
_ARITHMETIC: dict[str, Function] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
_EXTREMES: dict[str, tuple[Function, Function]] = {
    "min": (np.minimum, ar.smallest),
    "max": (np.maximum, ar.largest),
}
_OF_FLOAT64: dict[str, Function] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "tanh": np.tanh,
}

_FORMS: list[tuple[re.Pattern[str], Callable[..., Operation]]] = []


def _form(pattern: str) -> Callable[[Callable[..., Operation]], Callable[..., Operation]]:
    def register(make: Callable[..., Operation]) -> Callable[..., Operation]:
        _FORMS.append((re.compile(pattern), make))
        return make

    return register


@functools.cache
def operation(opcode: str, operands: int) -> Operation:
    """Return what an opcode with so many sources does.

    Raises:
        Unsupported: the opcode, one of its modifiers or the number of its sources is not known.
    """
    for pattern, make in _FORMS:
        if match := pattern.fullmatch(opcode):
            found = make(*match.groups())
            if operands == 3 and re.fullmatch(r"(min|max)(\.ftz)?(\.NaN)?\.f32", opcode):
                found = _of_three(found)
            if len(found.sources) != operands:
                raise Unsupported(f"{opcode} with {operands} sources")
            return found
    raise Unsupported(opcode)


def _of_three(found: Operation) -> Operation:
    """Return the maximum of three operands, which sm_100 has."""
    of_two, kind = found.function, found.result
    return Operation(kind, (kind,) * 3, lambda a, b, c: of_two(of_two(a, b), c))


def _flushing(function: Function) -> Function:
    return lambda *values: ar.flush(function(*map(ar.flush, values)))


@_form(r"(add|sub|mul)(?:\.rn)?(\.ftz)?\.(f32|f64)")
def _float(name: str, ftz: str | None, kind: str) -> Operation:
    function = _ARITHMETIC[name]
    if ftz and kind == "f64":
        raise Unsupported(f"{name}.ftz.f64")
    return Operation(kind, (kind, kind), _flushing(function) if ftz else function)


@_form(r"(add|sub|fma)\.rn\.f32\.(bf16|f16)")
def _mixed(name: str, narrow: str) -> Operation:
    """Only the last source, which is added or subtracted, has 32 bits."""
    widen = _widen(narrow)
    kind, wide = widen.sources[0], widen.function
    if name == "fma":
        return Operation("f32", (kind, kind, "f32"), lambda a, b, c: ar.fma(wide(a), wide(b), c))
    function = _ARITHMETIC[name]
    return Operation("f32", (kind, "f32"), lambda a, c: function(wide(a), c))


@_form(r"(add|sub|mul|fma)(?:\.rn)?(\.ftz)?\.f32x2")
def _pair(name: str, ftz: str | None) -> Operation:
    function = ar.fma if name == "fma" else _ARITHMETIC[name]
    function = ar.by_halves(_flushing(function) if ftz else function)
    return Operation("b64", ("b64",) * (3 if name == "fma" else 2), function)


@_form(r"(fma)\.rn(\.ftz)?\.f32")
def _fma(_: str, ftz: str | None) -> Operation:
    return Operation("f32", ("f32",) * 3, _flushing(ar.fma) if ftz else ar.fma)


@_form(r"(add|sub|mul\.lo)\.[su](16|32|64)")
def _integer(name: str, bits: str) -> Operation:
    kind = f"u{bits}"  # sums and products wrap: those of signed numbers have the same bits
    return Operation(kind, (kind, kind), _ARITHMETIC[name[:3]])


@_form(r"mad\.lo\.[su](16|32|64)")
def _mad(bits: str) -> Operation:
    return Operation(f"u{bits}", (f"u{bits}",) * 3, lambda a, b, c: a * b + c)


@_form(r"(mul|mad)\.wide\.([su])(16|32)")
def _wide(name: str, sign: str, bits: str) -> Operation:
    to = 2 * int(bits)
    dtype = (ar.SIGNED if sign == "s" else ar.UNSIGNED)[to]
    kind, wide = f"{sign}{bits}", f"{sign}{to}"
    if name == "mul":
        return Operation(wide, (kind, kind), lambda a, b: a.astype(dtype) * b.astype(dtype))
    return Operation(
        wide, (kind, kind, wide), lambda a, b, c: a.astype(dtype) * b.astype(dtype) + c
    )


@_form(r"mul\.hi\.([su])32")
def _high(sign: str) -> Operation:
    wide = np.int64 if sign == "s" else np.uint64

    def high(a: Array, b: Array) -> Array:
        return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)

    return Operation(f"{sign}32", (f"{sign}32",) * 2, high)


@_form(r"(div|rem)\.([su](?:16|32|64))")
def _divided(name: str, kind: str) -> Operation:
    if name == "div":
        return Operation(kind, (kind, kind), ar.quotient)
    return Operation(kind, (kind, kind), lambda a, b: a - ar.quotient(a, b) * b)


@_form(r"(min|max)\.([su](?:16|32|64))")
def _extreme(name: str, kind: str) -> Operation:
    return Operation(kind, (kind, kind), _EXTREMES[name][0])


@_form(r"(min|max)(\.ftz)?(\.NaN)?\.f32")
def _float_extreme(name: str, ftz: str | None, nan: str | None) -> Operation:
    function = _EXTREMES[name][1]
    function = ar.or_nan(function) if nan else function
    return Operation("f32", ("f32", "f32"), _flushing(function) if ftz else function)


@_form(r"(and|or|xor)\.(pred|b16|b32|b64)")
def _logic(name: str, kind: str) -> Operation:
    return Operation(kind, (kind, kind), _LOGIC[name])


@_form(r"not\.(pred|b16|b32|b64)")
def _not(kind: str) -> Operation:
    return Operation(kind, (kind,), np.invert)


@_form(r"(shl|shr)\.([bsu])(16|32|64)")
def _shift(name: str, sign: str, bits: str) -> Operation:
    if name == "shl" and sign != "b":
        raise Unsupported(f"shl.{sign}{bits}")
    kind = f"{sign}{bits}"
    return Operation(kind, (kind, "u32"), functools.partial(_shifted, left=name == "shl"))


def _shifted(a: Array, by: Array, *, left: bool) -> Array:
    return ar.shifted(a, by, left=left)


_BITWISE: dict[str, tuple[int, Function]] = {
    "bfe.u32": (3, ar.field),
    "bfi.b32": (4, ar.inserted),
    "prmt.b32": (3, ar.permuted),
    "lop3.b32": (4, ar.looked_up),
    "popc.b32": (1, lambda a: np.bitwise_count(a).astype(np.uint32)),
    "clz.b32": (1, ar.leading_zeros),
}


@_form(r"(bfe\.u32|bfi\.b32|prmt\.b32|lop3\.b32|popc\.b32|clz\.b32)")
def _bitwise(opcode: str) -> Operation:
    count, function = _BITWISE[opcode]
    return Operation("u32", ("u32",) * count, function)


@_form(r"(neg|abs)(\.ftz)?\.(f32|f64|s16|s32|s64)")
def _sign(name: str, ftz: str | None, kind: str) -> Operation:
    function: Function = np.negative if name == "neg" else np.abs
    if ftz and kind != "f32":
        raise Unsupported(f"{name}.ftz.{kind}")
    return Operation(kind, (kind,), _flushing(function) if ftz else function)


@_form(r"copysign\.f32")
def _copysign() -> Operation:
    return Operation("f32", ("f32", "f32"), lambda a, b: np.copysign(b, a))


@_form(r"selp\.([bsuf](?:16|32|64))")
def _select(kind: str) -> Operation:
    return Operation(kind, (kind, kind, "pred"), lambda a, b, p: np.where(p, a, b))


@_form(r"setp\.([a-z]+)(?:\.(and|or|xor))?(\.ftz)?\.([bsuf](?:16|32|64))")
def _compare(name: str, logic: str | None, ftz: str | None, kind: str) -> Operation:
    function = _comparison(name, kind)
    if ftz:
        if kind != "f32":
            raise Unsupported(f"setp.ftz.{kind}")
        plain = function
        function = lambda a, b: plain(ar.flush(a), ar.flush(b))  # noqa: E731 - a def is no shorter
    if logic is None:
        return Operation("pred", (kind, kind), function)
    join, compared = _LOGIC[logic], function
    return Operation("pred", (kind, kind, "pred"), lambda a, b, p: join(compared(a, b), p))


def _comparison(name: str, kind: str) -> Function:
    """Return a comparison; with a NaN the plain ones are false, and those with a u are true."""
    if kind[0] != "f":
        allowed = {"b": ("eq", "ne"), "s": tuple(_COMPARE)}.get(kind[0])
        name = _UNSIGNED_COMPARE.get(name, name) if kind[0] == "u" else name
        if name not in (allowed or _COMPARE):
            raise Unsupported(f"setp.{name}.{kind}")
        return _COMPARE[name]
    if name in ("nan", "num"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) ^ (name == "num")
    compare = _COMPARE.get(name if len(name) == 2 else name.removesuffix("u"))
    if compare is None:
        raise Unsupported(f"setp.{name}.{kind}")
    if len(name) == 3:
        return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)
    if name == "ne":  # numpy's alone is true of a NaN
        return lambda a, b: compare(a, b) & ~(np.isnan(a) | np.isnan(b))
    return compare


@_form(r"(mov)\.(pred|[bsuf](?:16|32|64))")
def _move(_: str, kind: str) -> Operation:
    return Operation(kind, (kind,), lambda a: a)


@_form(r"cvta\.to\.global\.u64")
def _to_global() -> Operation:
    return Operation("u64", ("u64",), lambda a: a)  # addresses of global memory are generic ones


@_form(r"(ex2|lg2|rcp|sqrt|rsqrt|tanh)\.approx(\.ftz)?\.f32")
def _approximate(name: str, ftz: str | None) -> Operation:
    exact = _OF_FLOAT64[name]
    function: Function = lambda a: exact(np.asarray(a, np.float64))  # noqa: E731 - as below
    return Operation("f32", ("f32",), function, error=ERRORS[name], flushes=ftz is not None)


@_form(r"(rcp|sqrt)\.rn\.f32")
def _rounded(name: str) -> Operation:
    function: Function = np.sqrt if name == "sqrt" else (lambda a: np.float32(1) / a)
    return Operation("f32", ("f32",), function)


@_form(r"div\.(full|approx)(\.ftz)?\.f32")
def _approximate_quotient(_: str, ftz: str | None) -> Operation:
    function: Function = lambda a, b: np.divide(a, b, dtype=np.float64)  # noqa: E731 - as above
    return Operation("f32", ("f32", "f32"), function, error=ERRORS["div"], flushes=ftz is not None)


@_form(r"div\.rn(\.ftz)?\.f32")
def _quotient(ftz: str | None) -> Operation:
    return Operation("f32", ("f32", "f32"), _flushing(np.divide) if ftz else np.divide)


@_form(r"cvt\.([su])(8|16|32|64)\.([su])(8|16|32|64)")
def _convert(sign: str, bits: str, source_sign: str, source_bits: str) -> Operation:
    dtype = (ar.SIGNED if sign == "s" else ar.UNSIGNED)[int(bits)]
    result, source = f"{sign}{bits}", f"{source_sign}{source_bits}"
    return Operation(result, (source,), lambda a: a.astype(dtype), loose=True)


@_form(r"cvt\.rn\.f(32|64)\.([su](?:8|16|32|64))")
def _to_float(bits: str, source: str) -> Operation:
    dtype = ar.FLOATS[int(bits)]
    return Operation(f"f{bits}", (source,), lambda a: a.astype(dtype), loose=True)


@_form(r"cvt\.rn\.(bf16|f16)(x2)?\.f32")
def _narrow(to: str, pair: str | None) -> Operation:
    narrow = ar.to_bfloat16 if to == "bf16" else ar.to_float16
    if pair is None:
        return Operation("b16", ("f32",), narrow)

    def both(high: Array, low: Array) -> Array:
        return narrow(high).astype(np.uint32) << np.uint32(16) | narrow(low)

    return Operation("b32", ("f32", "f32"), both)


@_form(r"cvt\.f32\.(bf16|f16)")
def _widen(source: str) -> Operation:
    if source == "f16":
        return Operation("f32", ("f16",), lambda a: a.astype(np.float32))

    def widened(a: Array) -> Array:
        return (a.astype(np.uint32) << np.uint32(16)).view(np.float32)

    return Operation("f32", ("u16",), widened)


@_form(r"cvt\.(f64\.f32|rn\.f32\.f64)")
def _resize(which: str) -> Operation:
    to, source = ("f64", "f32") if which == "f64.f32" else ("f32", "f64")
    dtype = ar.FLOATS[int(to[1:])]
    return Operation(to, (source,), lambda a: a.astype(dtype))


@_form(r"cvt\.(rni|rzi|rmi|rpi)\.([su])(32|64)\.f32")
def _to_integer(rounding: str, sign: str, bits: str) -> Operation:
    to = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding]
    dtype = (ar.SIGNED if sign == "s" else ar.UNSIGNED)[int(bits)]
    least, most = np.iinfo(dtype).min, np.iinfo(dtype).max

    def whole(a: Array) -> Array:  # what is too large is clamped, and NaN is 0
        x = to(np.asarray(a, np.float64))
        inside = (x > float(least)) & (x < float(most))
        clamped = np.where(x >= float(most), most, np.where(x <= float(least), least, 0))
        return np.where(inside, np.where(inside, x, 0).astype(dtype), clamped.astype(dtype))

    return Operation(f"{sign}{bits}", ("f32",), whole)


@_form(r"cvt\.(rni|rzi|rmi|rpi)\.f32\.f32")
def _to_whole(rounding: str) -> Operation:
    to = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding]
    return Operation("f32", ("f32",), to)
