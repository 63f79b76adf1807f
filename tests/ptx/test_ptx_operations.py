"""Each instruction against what Python's whole numbers and fractions, or torch, make of it."""

from __future__ import annotations

import fractions
import math

import numpy as np
import pytest
import torch
from assembly import compute, program_of, run

from bench.ptx.machine import Machine
from bench.ptx.memory import Memory
from bench.ptx.operations import ERRORS, operation
from bench.ptx.program import Unsupported

INTERESTING = np.array(
    [0.0, -0.0, 1.0, -1.5, np.inf, -np.inf, np.nan, 1e-40, -1e-45, 3e38, 2.0**-126, 1 + 2.0**-23],
    np.float32,
)
WHOLE = np.array([0, 1, 2, 31, 32, 33, 2**31 - 1, 2**31, 2**32 - 1, 0x12345678], np.uint32)


def pairs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.repeat(values, len(values)), np.tile(values, len(values))


def signed(x: int, bits: int = 32) -> int:
    return x - (1 << bits) if x >> bits - 1 else x


def equal(got: np.ndarray, wanted: np.ndarray) -> None:
    """Bit by bit, but any NaN for any other."""
    nan = np.isnan(wanted)
    assert (np.isnan(got) == nan).all()
    bits = f"u{wanted.dtype.itemsize}"
    assert (got.view(bits) == wanted.view(bits))[~nan].all()


# name, what it makes of two numbers 0 <= a, b < 2^32
OF_TWO = {
    "add.s32": lambda a, b: a + b,
    "sub.u32": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: a * b,
    "min.s32": lambda a, b: min(signed(a), signed(b)),
    "max.u32": lambda a, b: max(a, b),
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << min(b, 32),
    "shr.u32": lambda a, b: a >> min(b, 32),
    "shr.s32": lambda a, b: signed(a) >> min(b, 31),
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "mul.hi.s32": lambda a, b: signed(a) * signed(b) >> 32,
    "div.s32": lambda a, b: int(fractions.Fraction(signed(a), signed(b))) if b else -1,
    "rem.s32": lambda a, b: math.fmod(signed(a), signed(b)) if b else a,
    "div.u32": lambda a, b: a // b if b else -1,
}


@pytest.mark.parametrize("opcode", OF_TWO)
def test_integers_of_two(opcode: str) -> None:
    a, b = pairs(WHOLE)
    if opcode in ("div.s32", "rem.s32"):
        keep = ~((a == 2**31) & (b == 2**32 - 1))  # overflows on a device too
        a, b = a[keep], b[keep]
    wanted = [int(OF_TWO[opcode](int(x), int(y))) % 2**32 for x, y in zip(a, b, strict=True)]
    assert compute(opcode, "u32 u32 u32", a, b).tolist() == wanted


def test_products_twice_as_wide_keep_the_sign() -> None:
    a, b = pairs(WHOLE)
    c = np.full(len(a), 2**63, np.uint64)
    for opcode, kinds, function in (
        ("mul.wide.s32", "u64 u32 u32", lambda a, b: signed(a) * signed(b)),
        ("mul.wide.u32", "u64 u32 u32", lambda a, b: a * b),
    ):
        wanted = [function(int(x), int(y)) % 2**64 for x, y in zip(a, b, strict=True)]
        assert compute(opcode, kinds, a, b).tolist() == wanted
    mad = compute("mad.wide.s32", "u64 u32 u32 u64", a, b, c)
    wanted = [(signed(int(x)) * signed(int(y)) + 2**63) % 2**64 for x, y in zip(a, b, strict=True)]
    assert mad.tolist() == wanted
    narrow = compute("mad.lo.s32", "u32 u32 u32 u32", a, b, a)
    assert narrow.tolist() == [
        (int(x) * int(y) + int(x)) % 2**32 for x, y in zip(a, b, strict=True)
    ]


def test_bits_are_picked_and_placed() -> None:
    a, at = pairs(WHOLE)
    length = np.full(len(a), 5, np.uint32)
    assert compute("bfe.u32", "u32 u32 u32 u32", a, at, length).tolist() == [
        int(x) >> min(int(n) & 255, 32) & 31 for x, n in zip(a, at, strict=True)
    ]
    got = compute("bfi.b32", "u32 u32 u32 u32 u32", a, ~a, at, length)
    for x, n, found in zip(a.tolist(), at.tolist(), got.tolist(), strict=True):
        mask = 31 << min(n & 255, 32) & 0xFFFFFFFF
        assert found == (x << min(n & 255, 32) & mask) | (~x & 0xFFFFFFFF & ~mask)
    assert compute("popc.b32", "u32 u32", a).tolist() == [int(x).bit_count() for x in a]
    assert compute("clz.b32", "u32 u32", a).tolist() == [32 - int(x).bit_length() for x in a]
    bytes_of_both = compute(
        "prmt.b32", "u32 u32 u32 u32", np.array([0x33221100], np.uint32),
        np.array([0x77665584], np.uint32), np.array([0xC703], np.uint32),
    )  # fmt: skip
    assert hex(bytes_of_both[0]) == hex(0xFF770033)  # 3, 0, 7 and the sign of 4


@pytest.mark.parametrize("opcode", ["add.f32", "sub.rn.f32", "mul.f32", "div.rn.f32"])
def test_floats_of_two_are_rounded_once(opcode: str) -> None:
    a, b = pairs(INTERESTING)
    rng = np.random.default_rng(0)
    a, b = (
        np.r_[x, (rng.standard_normal(200) * 2.0 ** rng.integers(-70, 70, 200))] for x in (a, b)
    )
    a, b = a.astype(np.float32), b.astype(np.float32)
    at = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div}[opcode[:3]]
    wanted = at(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    equal(compute(opcode, "f32 f32 f32", a, b), wanted)


def test_flush_to_zero_flushes_what_goes_in_and_what_comes_out() -> None:
    a = np.array([1e-40, -1e-40, 2.0**-126, 2.0**-126, 1.0], np.float32)
    b = np.array([1.0, 1.0, 0.5, 1.0, 1e-40], np.float32)
    assert compute("mul.ftz.f32", "f32 f32 f32", a, b).tolist() == [0, 0, 0, 2.0**-126, 0]
    kept = compute("mul.f32", "f32 f32 f32", a, b)
    assert (kept == a * b).all() and (kept != 0).all()
    assert np.signbit(compute("mul.ftz.f32", "f32 f32 f32", a, b)[1])


def nearest(x: fractions.Fraction) -> float:
    """Round to float32, ties to even, by whole numbers alone."""
    if not x:
        return 0.0
    exponent = max(math.floor(math.log2(abs(x))) - 23, -149)
    for e in (exponent - 1, exponent, exponent + 1):  # log2 may be off by one
        scaled = abs(x) / fractions.Fraction(2) ** e
        if e >= -149 and (scaled < 2**24 or e == exponent + 1):
            whole, rest = divmod(scaled, 1)
            up = rest > fractions.Fraction(1, 2) or (rest == fractions.Fraction(1, 2) and whole % 2)
            value = float((whole + up) * fractions.Fraction(2) ** e)
            return math.copysign(value, x)
    raise AssertionError(x)


def test_fma_is_rounded_once() -> None:
    """Random, and where two roundings give another result: sums near the middle of two float32."""
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal(3000).astype(np.float32) for _ in range(2))
    c = (rng.standard_normal(3000) * 2.0 ** rng.integers(-30, 30, 3000)).astype(np.float32)
    c[:1000] = -(a[:1000] * b[:1000])  # what is left is the product's rounding
    tie = np.float32(1 + 2.0**-12)
    a[1000:1010] = tie  # its square is 1 + 2^-11 + 2^-24: a tie, that c breaks
    b[1000:1010] = tie
    c[1000:1010] = np.ldexp(np.array([1, -1, 0, 3, -3] * 2), -60).astype(np.float32)
    got = np.concatenate(
        [
            compute("fma.rn.f32", "f32 f32 f32 f32", *(x[n : n + 1000] for x in (a, b, c)))
            for n in (0, 1000, 2000)
        ]
    )
    exact = [
        nearest(
            fractions.Fraction(float(x)) * fractions.Fraction(float(y))
            + fractions.Fraction(float(z))
        )
        for x, y, z in zip(a, b, c, strict=True)
    ]
    assert got.tolist() == exact
    twice = (a * b + c).astype(np.float32)
    assert (twice != got)[1000:1010].any(), "no case here tells one rounding from two"


def test_pairs_of_floats_are_two() -> None:
    rng = np.random.default_rng(2)
    a, b, c = (rng.standard_normal(64).astype(np.float32) for _ in range(3))
    wide = [x.view(np.uint64) for x in (a, b, c)]
    for opcode, values, alone in (
        ("add.rn.f32x2", wide[:2], "add.rn.f32"),
        ("mul.f32x2", wide[:2], "mul.f32"),
        ("fma.rn.f32x2", wide, "fma.rn.f32"),
    ):
        kinds = " ".join(["b64"] * (len(values) + 1))
        got = compute(opcode, kinds, *values).view(np.float32)
        single = compute(alone, kinds.replace("b64", "f32"), *(x.view(np.float32) for x in values))
        equal(got, single)


def test_sums_of_mixed_precision_widen_all_but_the_last() -> None:
    rng = np.random.default_rng(6)
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        a, b = (torch.from_numpy(rng.standard_normal(64)).to(dtype) for _ in range(2))
        c = rng.standard_normal(64).astype(np.float32)
        bits = [x.view(torch.int16).numpy().view("u2") for x in (a, b)]
        wide = [x.float().numpy() for x in (a, b)]
        equal(compute(f"add.rn.f32.{name}", "f32 b16 f32", bits[0], c), wide[0] + c)
        equal(compute(f"sub.rn.f32.{name}", "f32 b16 f32", bits[0], c), wide[0] - c)
        got = compute(f"fma.rn.f32.{name}", "f32 b16 b16 f32", *bits, c)
        equal(got, compute("fma.rn.f32", "f32 f32 f32 f32", *wide, c))


def test_a_number_beats_nan_and_zeros_have_an_order() -> None:
    a, b = pairs(INTERESTING)
    got = compute("max.f32", "f32 f32 f32", a, b)
    for x, y, found in zip(a, b, got, strict=True):
        if np.isnan(x) or np.isnan(y):
            wanted = y if np.isnan(x) else x
        elif x == y == 0:
            wanted = -0.0 if np.signbit(x) and np.signbit(y) else 0.0
        else:
            wanted = max(x, y)
        equal(np.float32([found]), np.float32([wanted]))
    equal(compute("min.f32", "f32 f32 f32", a, b), -compute("max.f32", "f32 f32 f32", -a, -b))
    assert np.isnan(compute("max.NaN.f32", "f32 f32 f32", a, b)[np.isnan(a) | np.isnan(b)]).all()


def test_a_maximum_of_three_looks_at_the_third() -> None:
    a, b, c = (np.float32([x]) for x in (1, 2, 3))
    assert compute("max.f32", "f32 f32 f32 f32", a, b, c) == 3
    assert compute("min.f32", "f32 f32 f32 f32", c, b, a) == 1
    with pytest.raises(Unsupported, match="with 3 sources"):
        compute("max.s32", "s32 s32 s32 s32", *(x.astype(np.int32) for x in (a, b, c)))


COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_of_nan(name: str) -> None:
    """The plain ones are false of it, `ne` too; those with a u are true."""
    a, b = pairs(INTERESTING)
    nan = np.isnan(a) | np.isnan(b)
    plain = np.array([eval(f"x {COMPARISONS[name]} y") for x, y in zip(a, b, strict=True)])
    assert (compute(f"setp.{name}.f32", "pred f32 f32", a, b) == (plain & ~nan)).all()
    assert (compute(f"setp.{name}u.f32", "pred f32 f32", a, b) == (plain | nan)).all()
    assert (compute("setp.nan.f32", "pred f32 f32", a, b) == nan).all()
    assert (compute("setp.num.f32", "pred f32 f32", a, b) == ~nan).all()


def test_comparisons_of_integers_by_sign() -> None:
    a, b = pairs(WHOLE)
    assert (compute("setp.lt.s32", "pred s32 s32", a, b) == (a.view("i4") < b.view("i4"))).all()
    assert (compute("setp.lt.u32", "pred u32 u32", a, b) == (a < b)).all()
    assert (compute("setp.lo.u32", "pred u32 u32", a, b) == (a < b)).all()
    with pytest.raises(Unsupported):
        operation("setp.lt.b32", 2)


def test_rounding_to_16_bits_is_torchs() -> None:
    rng = np.random.default_rng(3)
    x = np.r_[INTERESTING, rng.standard_normal(500) * 2.0 ** rng.integers(-30, 20, 500)]
    x = np.r_[x, 1 + np.arange(64) * 2.0**-12].astype(np.float32)  # ties among them
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        wanted = torch.from_numpy(x).to(dtype)
        got = torch.from_numpy(compute(f"cvt.rn.{name}.f32", "b16 f32", x).view("i2")).view(dtype)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
        pair = compute(f"cvt.rn.{name}x2.f32", "b32 f32 f32", x, x[::-1].copy())
        low = torch.from_numpy(pair.view("i2")[::2].copy()).view(dtype)
        torch.testing.assert_close(low, wanted.flip(0), rtol=0, atol=0, equal_nan=True)
        back = compute(f"cvt.f32.{name}", "f32 b16", got.view(torch.int16).numpy().view("u2"))
        torch.testing.assert_close(
            torch.from_numpy(back), got.float(), rtol=0, atol=0, equal_nan=True
        )


def test_signs_are_carried_into_wider_registers() -> None:
    """A load or conversion of a signed number into a register that is wider extends its sign."""
    at = "st.global.b64 [%rd4], %rd5;"
    for body, given, wanted in (
        ("ld.param.s32 %rd5, [number];", (), -7),
        ("ld.global.s32 %rd5, [%rd3];", np.int32([-7]), -7),
        ("ld.global.b32 %rd5, [%rd3];", np.int32([-7]), 2**32 - 7),
        ("ld.global.s8 %rd5, [%rd3];", np.int8([-7]), -7),
        ("ld.global.b32 %r5, [%rd3]; cvt.s64.s32 %rd5, %r5;", np.int32([-7]), -7),
        ("ld.global.b32 %r5, [%rd3]; cvt.u64.u32 %rd5, %r5;", np.int32([-7]), 2**32 - 7),
        ("ld.global.b64 %rd5, [%rd3]; cvt.s64.s8 %rd5, %rd5;", np.int64([0x1F9]), -7),
    ):
        found, _ = run(body + at, given, number=-7)
        assert found.view("i8")[0] == wanted, body


def test_conversions_to_whole_numbers_clamp() -> None:
    x = np.array([2.5, -2.5, 3.5, np.inf, -np.inf, np.nan, 3e9, -3e9, 0.4], np.float32)
    assert compute("cvt.rzi.s32.f32", "s32 f32", x).tolist() == [
        2, -2, 3, 2**31 - 1, -(2**31), 0, 2**31 - 1, -(2**31), 0,
    ]  # fmt: skip
    assert compute("cvt.rni.s32.f32", "s32 f32", x[:3]).tolist() == [2, -2, 4]
    assert compute("cvt.rn.f32.s32", "f32 s32", np.int32([-5, 2**24 + 1])).tolist() == [-5, 2**24]


@pytest.mark.parametrize(
    ("opcode", "kinds", "function"),
    [
        ("ex2.approx.f32", "f32 f32", lambda x: 2.0**x),
        ("lg2.approx.f32", "f32 f32", np.log2),
        ("rcp.approx.f32", "f32 f32", lambda x: 1 / x),
        ("sqrt.approx.f32", "f32 f32", np.sqrt),
        ("rsqrt.approx.f32", "f32 f32", lambda x: 1 / np.sqrt(x)),
        ("tanh.approx.f32", "f32 f32", np.tanh),
    ],
)
def test_approximate_functions_without_noise_are_right(opcode, kinds, function) -> None:
    x = np.random.default_rng(4).uniform(0.1, 40, 500).astype(np.float32)
    got, wanted = compute(opcode, kinds, x), function(x.astype(np.float64))
    assert (np.abs(got - wanted) <= 2.0**-24 * np.abs(wanted)).all()


@pytest.mark.parametrize("seed", [1, -1, 7])
@pytest.mark.parametrize("name", ["ex2.approx", "div.full"])
def test_noise_is_as_large_as_allowed_and_no_larger(name: str, seed: int) -> None:
    x = np.random.default_rng(5).uniform(0.1, 40, 32).astype(np.float32)
    x[:2] = 0.0, 7.0
    from bench.ptx.lanes import Noise

    operands = "%r1" if name.startswith("ex2") else "%r1, %r1"
    body = f"ld.global.b32 %r1, [%rd3]; {name}.f32 %r2, {operands}; st.global.b32 [%rd4], %r2;"
    given = np.zeros((32, 2), np.float32)
    given[:, 0] = x
    errors = []
    for _ in range(2):
        found, _ = run(body, given, noise=Noise(seed))
        got = found.view(np.float32)[:64:2].astype(np.float64)
        wanted = 2.0 ** x.astype(np.float64) if name.startswith("ex2") else np.ones(32)
        errors.append((got / wanted - 1)[1:])
    bound = ERRORS[name[:3]]
    assert (np.abs(errors[0]) <= bound).all() and np.abs(errors[0]).max() > bound / 2
    assert (errors[0] == errors[1]).all()
    signs = set(np.sign(errors[0]).tolist())
    assert signs == ({-1.0, 1.0} if seed == 7 else {float(seed)})
    if name.startswith("ex2"):
        assert got[0] == 1.0


@pytest.mark.parametrize(
    "body",
    [
        "frob.f32 %r1, %r2;",
        "add.rz.f32 %r1, %r2, %r3;",
        "add.sat.s32 %r1, %r2, %r3;",
        "add.f32 %r1, %r2;",
        "add.f32 %r1, %r2, %r3, %r4;",
        "max.xorsign.abs.f32 %r1, %r2, %r3;",
        "fma.rz.f32 %r1, %r2, %r3, %r4;",
        "mul.s32 %r1, %r2, %r3;",
        "cvt.rz.f32.s32 %r1, %r2;",
        "cvt.rn.satfinite.bf16x2.f32 %r1, %r2, %r3;",
        "selp.f32 %r1, %r2, %r3;",
        "add.f32 %r1, %rd2, %r3;",  # a register of another width
        "add.s64 %rd5, %r1, %rd2;",
        "mov.u32 %r1, %clock;",
        "mov.u32 %r1, symbol;",
        "mov.b32 %r1, 0f3F800000; add.f32 %r1, %r1, 1;",  # a whole number is not 1.0
        "mov.b32 %r1, 4294967296;",
        "ld.global.volatile.b32 %r1, [%rd3];",
        "ld.global.v2.b32 {%r1, %r2, %r3}, [%rd3];",
        "ld.shared.b32 %r1, [%rd3];",
        "ld.local.b32 %r1, [%rd3];",
        "atom.global.add.u32 %r1, [%rd3], 1;",
        "shfl.sync.bfly.b32 %r1|%p1, %r2, 1, 31, -1;",
        "shfl.sync.bfly.b32 %r1, %r2, 1, 15, -1;",
        "shfl.sync.bfly.b32 %r1, %r2, 1, 31;",
        "redux.sync.add.f32 %r1, %r2, -1;",
        "bar.red.popc.u32 %r1, 0, %p1;",
        "bar.sync 1;",
        "bar.sync 0, 16;",
        "cp.async.ca.shared.global [%r1], [%rd3], 16;",
        "call.uni (%r1), f, (%r2);",
        "{ .reg .b32 %r<4>; }",
    ],
)
def test_what_is_not_known_is_an_error(body: str) -> None:
    with pytest.raises(Unsupported):
        Machine(program_of(body), [0, 0, 0], Memory("global", {}), shared=0)


@pytest.mark.parametrize(
    "body", ["bar.sync 1;", "bar.sync 0, 16;", "@%p0 ret;", "bra %rd3;", "membar.gl;"]
)
def test_what_is_not_known_on_the_way_is_an_error(body: str) -> None:
    with pytest.raises(Unsupported):
        run(body)
