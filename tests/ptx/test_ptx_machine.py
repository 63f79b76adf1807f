"""Memory, races, the order of warps, divergence and counts, on programs of a few instructions."""

from __future__ import annotations

import numpy as np
import pytest
from assembly import IN, OUT, program_of, run

from bench.ptx.machine import Machine
from bench.ptx.memory import Fault, Memory
from bench.ptx.program import Unsupported, parse
from bench.ptx.races import Race

ORDERS = ["lockstep", "reversed", "random"]
MINE = "mul.lo.s32 %r4, %r0, 4;"  # the address of a word of each thread
BESIDE = "xor.b32 %r5, %r0, {by}; mul.lo.s32 %r5, %r5, 4;"  # and of another thread's


def words(found: np.ndarray, count: int) -> list[int]:
    return found.view(np.uint32)[: 2 * count : 2].tolist()


# memory


@pytest.mark.parametrize(
    ("access", "message"),
    [
        ("ld.global.b32 %r1, [%rd0 + -4];", "out of bounds"),
        ("ld.global.b32 %r1, [%rd0 + 1024];", "out of bounds"),
        ("st.global.b64 [%rd0 + 1024], %rd2;", "out of bounds"),
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0 + 1016];", "misaligned"),
        ("ld.global.b32 %r1, [%rd0 + 2];", "misaligned"),
        ("mov.u32 %r1, 1024; ld.shared.b32 %r2, [%r1];", "out of bounds of 1024"),
        ("mov.u32 %r1, 0; st.shared.b32 [%r1 + -4], %r0;", "out of bounds"),
        ("mov.u32 %r1, 0; ld.shared.b32 %r2, [%r1];", "nobody has written"),
        ("mov.u64 %rd5, 0; ld.global.b32 %r1, [%rd5];", "out of bounds"),
    ],
)
def test_accesses_that_are_wrong(access: str, message: str) -> None:
    with pytest.raises(Fault, match=message):
        run(access)
    run(f"setp.eq.u32 %p1, %r0, 999; @%p1 {access.replace('; ', '; @%p1 ')}")  # of no lane


def test_between_two_rows_is_nothing() -> None:
    rows = {IN: np.zeros(100, np.uint8), IN + 128: np.zeros(100, np.uint8)}
    memory = Memory("global", {**rows, OUT: np.zeros(512, np.uint8)})
    assert memory.locate(np.array([IN + 96, IN + 128]), 4).shape == (2,)
    for wrong in (IN + 100, IN + 124):
        with pytest.raises(Fault, match="out of bounds"):
            memory.locate(np.array([IN, wrong]), 4)


def test_memory_that_is_new_is_written_before_it_is_read() -> None:
    memory = Memory("global", {IN: np.zeros(64, np.uint8)})
    memory.forget(IN + 8, 8)
    at = memory.locate(np.array([IN, IN + 8]), 8)
    memory.load(at[:1], 1, 64)
    with pytest.raises(Fault):
        memory.load(at, 1, 64)
    memory.store(at[1:], [np.uint32([7])], 32)
    with pytest.raises(Fault):  # half of it
        memory.load(at, 1, 64)
    memory.store(at[1:] + 4, [np.uint32([8])], 32)
    assert memory.load(at, 1, 64)[0].tolist() == [0, 8 << 32 | 7]


def test_lanes_that_are_off_keep_what_they_had() -> None:
    body = """
    mov.u32 %r1, 5;
    setp.lt.u32 %p1, %r0, 2;
    @%p1 ld.global.b32 %r1, [%rd3];
    @!%p1 add.s32 %r1, %r1, 1;
    st.global.b32 [%rd4], %r1;
    """
    found, _ = run(body, np.uint64([40, 41]))
    assert words(found, 32) == [40, 41] + [6] * 30


# races

EXCHANGE = f"""
{MINE} {BESIDE}
st.shared.b32 [%r4], %r0;
{{barrier}}
ld.shared.b32 %r6, [%r5];
st.global.b32 [%rd4], %r6;
"""


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("by", "scope"), [(1, "lanes"), (32, "warps")])
def test_a_barrier_makes_an_exchange_safe(by: int, scope: str, order: str) -> None:
    # fewer threads than the memory has words, so that what a faster warp finds is known
    zero = f"{MINE} st.shared.b32 [%r4], 0; bar.sync 0;"
    for barrier, races in (("bar.sync 0;", 0), ("", 1)):
        body = zero + EXCHANGE.format(by=by, barrier=barrier)
        found, machine = run(body, threads=64, order=order)
        assert len(machine.races) == races
        if barrier:
            assert words(found, 64) == [n ^ by for n in range(64)]
            assert machine.counts.barriers == 2
        for race in machine.races:
            assert (race.space, race.scope, race.same) == ("shared", scope, False)
            assert {race.first.what, race.second.what} == {"read", "write"}


def test_the_order_decides_what_a_race_leaves() -> None:
    body = "st.global.b32 [%rd1], %r0;"
    values = {order: int(run(body, threads=64, order=order)[0].view("u4")[0]) for order in ORDERS}
    assert values["lockstep"] != values["reversed"] and values["reversed"] == 31
    _, machine = run(body, threads=64)
    (race,) = machine.races
    assert (race.scope, race.same, race.first == race.second) == ("warps", False, True)


def test_one_value_from_all_threads_is_told_apart() -> None:
    (race,) = run("st.global.b32 [%rd1], 7;")[1].races
    assert (race.scope, race.same) == ("lanes", True)
    # the same value by two instructions, and then another one by a third thread
    for last, same in ((7, True), (8, False)):
        body = "setp.eq.u32 %p1, %r0, 0; @%p1 st.global.b32 [%rd1], 7;"
        body += f"@!%p1 st.global.b32 [%rd1], {last};"
        races = run(body)[1].races
        assert {race.same for race in races} == {same}


def test_a_byte_of_a_word_is_enough() -> None:
    body = """
    setp.eq.u32 %p1, %r0, 0;
    @%p1 st.global.b32 [%rd1], 7;
    setp.eq.u32 %p2, %r0, 1;
    @%p2 ld.global.b8 %rs1, [%rd1 + 3];
    """
    assert len(run(body)[1].races) == 1
    assert not run(body.replace("+ 3", "+ 4"))[1].races


def test_a_thread_does_not_race_with_itself() -> None:
    body = "st.global.b32 [%rd4], 1; ld.global.b32 %r1, [%rd4]; st.global.b32 [%rd4], %r0;"
    assert not run(body, threads=64)[1].races


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_blocks_race_over_the_whole_launch(at_once: int) -> None:
    """A barrier of one block is none for another, whenever that runs."""
    own = """
    mov.u32 %r1, %ctaid.x;
    mul.wide.u32 %rd5, %r1, 256;
    add.s64 %rd4, %rd4, %rd5;
    st.global.b32 [%rd4], %r1;
    bar.sync 0;
    """
    assert not run(own, blocks=3, at_once=at_once)[1].races
    for other in (
        "ld.global.b32 %r2, [%rd1];",  # what block 0 wrote
        "setp.eq.u32 %p1, %r1, 0; @%p1 ld.global.b32 %r2, [%rd1 + 512];",
        "st.global.b32 [%rd1 + 256], 5;",
    ):
        races = run(own + other, blocks=3, at_once=at_once)[1].races
        assert any(race.scope == "blocks" and not race.same for race in races), (other, races)
    reads = "ld.global.b32 %r2, [%rd0]; bar.sync 0;"  # by all
    assert not run(reads, blocks=3, at_once=at_once)[1].races
    late = reads + "mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 2; @%p1 st.global.b32 [%rd0], 1;"
    assert any(r.scope == "blocks" for r in run(late, blocks=3, at_once=at_once)[1].races)


def test_a_race_says_where() -> None:
    text = str(next(iter(run("st.global.b32 [%rd1], %r0;")[1].races)))
    assert text == "global, lanes: one instruction: a write of line 0 and a write of line 0, a race"
    assert isinstance(next(iter(run("st.global.b32 [%rd1], %r0;")[1].races)), Race)


# divergence, and lanes together


@pytest.mark.parametrize("order", ORDERS)
def test_branches_part_and_join(order: str) -> None:
    """A loop that each thread leaves after as many rounds as it has a number."""
    body = """
    mov.u32 %r1, 0;
    mov.u32 %r2, 0;
    setp.eq.u32 %p1, %r0, 0;
    @%p1 bra OUT;
    LOOP:
    add.s32 %r2, %r2, 1;
    add.s32 %r1, %r1, %r2;
    setp.lt.u32 %p2, %r2, %r0;
    @%p2 bra LOOP;
    OUT:
    bar.sync 0;
    st.global.b32 [%rd4], %r1;
    """
    found, machine = run(body, threads=64, order=order)
    assert words(found, 64) == [n * (n + 1) // 2 for n in range(64)]
    adds = [pc for pc, i in enumerate(machine.program.code) if i.opcode == "add.s32"]
    assert machine.counts.executed[adds[0]] == 31 + 63  # a warp steps while one of its lanes does


def test_a_barrier_that_some_never_reach() -> None:
    half = "setp.lt.u32 %p1, %r0, 16; @%p1 bra OUT; bar.sync 0; OUT:"
    with pytest.raises(Fault, match="apart meet bar"):
        run(half)
    for order in ("reversed", "random"):
        with pytest.raises(Fault, match="do not reach"):
            run(half.replace("16", "32"), threads=64, order=order)


def test_a_loop_without_an_end(monkeypatch) -> None:
    monkeypatch.setattr("bench.ptx.machine._STEPS", 1000)
    with pytest.raises(Fault, match="without an end"):
        run("LOOP: bra LOOP;")


def test_shuffles() -> None:
    given = np.arange(100, 132, dtype=np.uint64)
    for form, wanted in (
        ("bfly.b32 %r2, %r1, 4, 31, -1", [100 + (n ^ 4) for n in range(32)]),
        ("idx.b32 %r2, %r1, 3, 31, -1", [103] * 32),
        ("up.b32 %r2, %r1, 2, 0, -1", [100 + max(n - 2, n if n < 2 else 0) for n in range(32)]),
        (
            "down.b32 %r2, %r1, 2, 31, 0xffffffff",
            [100 + (n + 2 if n < 30 else n) for n in range(32)],
        ),
    ):
        found, _ = run(
            f"ld.global.b32 %r1, [%rd3]; shfl.sync.{form}; st.global.b32 [%rd4], %r2;", given
        )
        assert words(found, 32) == wanted
    for some in ("0x0000ffff", "15"):
        with pytest.raises(Unsupported, match="some lanes"):
            run(f"mov.u32 %r1, 1; shfl.sync.bfly.b32 %r2, %r1, 1, 31, {some};")
    with pytest.raises(Fault, match="some lanes"):
        run("setp.lt.u32 %p1, %r0, 5; @%p1 bra OUT; shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1; OUT:")


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        ("add.s32", lambda x: x.sum(1, dtype=np.int32)),
        ("min.s32", lambda x: x.min(1)),
        ("max.u32", lambda x: x.view("u4").max(1).view("i4")),
        ("or.b32", lambda x: np.bitwise_or.reduce(x, 1)),
        ("max.f32", lambda x: np.fmax.reduce(x.view("f4"), 1).view("i4")),
        ("min.abs.f32", lambda x: np.fmin.reduce(np.abs(x.view("f4")), 1).view("i4")),
    ],
)
def test_reductions_of_a_warp(form: str, wanted) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 32)).astype(np.float32).view("i4")
    if form == "max.f32":
        x.view("f4")[0, 5] = np.nan
    given = np.zeros((64, 2), np.int32)
    given[:, 0] = x.reshape(-1)
    body = f"ld.global.b32 %r1, [%rd3]; redux.sync.{form} %r2, %r1, -1; st.global.b32 [%rd4], %r2;"
    found, _ = run(body, given, threads=64)
    assert (
        found.view("i4")[:128:2].reshape(2, 32).tolist()
        == np.repeat(wanted(x)[:, None], 32, 1).tolist()
    )


def test_matrices_go_through_shared_memory_and_back() -> None:
    """What stmatrix lays down by rows, lanes read as rows; ldmatrix takes it up again."""
    body = """
    mul.lo.s32 %r1, %r0, 16;
    cvt.u64.u32 %rd6, %r0;
    shl.b32 %r2, %r0, 1;
    add.s32 %r3, %r2, 1;
    shl.b32 %r3, %r3, 16;
    or.b32 %r2, %r2, %r3;
    st.shared.v4.b32 [%r1], {%r0, %r0, %r0, %r0};
    bar.sync 0;
    stmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 [%r1], {%r2};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {%r5}, [%r1];
    setp.lt.u32 %p1, %r0, 8;
    mov.u64 %rd7, 0;
    @%p1 ld.shared.b64 %rd7, [%r1];
    st.global.b64 [%rd4], %rd7;
    st.global.b32 [%rd4 + 256], %r5;
    """
    for trans in ("", ".trans"):
        found, machine = run(body.replace("{trans}", trans), shared=1024)
        elements = np.arange(64, dtype=np.uint16).reshape(8, 8)
        rows = elements.T if trans else elements
        assert (found.view("u2")[:32].reshape(8, 4) == rows[:, :4]).all()
        words_back = found[256:].view("u4")[:64:2]
        assert words_back.tolist() == [2 * n | (2 * n + 1) << 16 for n in range(32)]
        assert not machine.races


# counts


@pytest.mark.parametrize(
    ("stride", "width", "sectors", "lines"),
    [(4, 4, 4, 1), (8, 4, 8, 2), (128, 4, 32, 32), (0, 4, 1, 1), (16, 16, 16, 4)],
)
def test_sectors_and_lines(stride: int, width: int, sectors: int, lines: int) -> None:
    form = {4: "b32 %r1", 16: "v4.b32 {%r1, %r2, %r3, %r4}"}[width]
    body = f"mad.wide.u32 %rd5, %r0, {stride}, %rd1; ld.global.{form}, [%rd5];"
    _, machine = run(body, counting=True)
    counts = machine.counts
    assert sum(counts.sectors.values()) == sectors and sum(counts.lines.values()) == lines
    assert sum(counts.bytes.values()) == (32 if stride else 1) * width
    assert sum(counts.active.values()) == 1
    # another warp that asks for the same shares the sectors, another block does not
    body = body.replace("%r0", "%r1").replace("mad.wide", "and.b32 %r1, %r0, 31; mad.wide", 1)
    _, machine = run(body, threads=64, blocks=2, counting=True)
    assert sum(machine.counts.sectors.values()) == 4 * sectors
    assert sum(machine.counts.fetched.values()) == 2 * sectors


@pytest.mark.parametrize(
    ("stride", "width", "conflicts"),
    [(4, 4, 0), (0, 4, 0), (8, 4, 1), (128, 4, 31), (16, 16, 0), (64, 16, 12)],
)
def test_bank_conflicts(stride: int, width: int, conflicts: int) -> None:
    form = {4: "b32 [%r1], %r0", 16: "v4.b32 [%r1], {%r0, %r0, %r0, %r0}"}[width]
    body = f"mul.lo.s32 %r1, %r0, {stride}; st.shared.{form};"
    _, machine = run(body, shared=4096, counting=True)
    assert sum(machine.counts.conflicts.values()) == conflicts


def test_instructions_by_kind() -> None:
    _, machine = run(
        "add.f32 %r1, %r2, %r3; ex2.approx.f32 %r1, %r1; bar.sync 0;", threads=64, blocks=3
    )
    kinds = machine.counts.by_kind(machine.program)
    assert (kinds["add, mul"], kinds["ex2"], kinds["barrier"], kinds["branch"]) == (6, 6, 6, 6)
    assert machine.counts.barriers == 3


# programs


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (".reqntid 32", ".reqntid 48"),
        (".reqntid 32", ".reqntid 32\n.reqnctapercluster 2, 1, 1"),
        (".reqntid 32", ".reqntid 32, 2, 1"),
        (".extern .shared", ".extern .local"),
        (".visible .entry", ".func f() { ret; }\n.visible .entry"),
        (".param .s32 number", ".param .align 8 .b8 number[16]"),
        ("  ret;\n}", "  ret;\n}\n.visible .entry second() { ret; }"),
        ("  ret;", "  ret"),
        (".reg .pred %p<9>;", ".reg .pred %p<9>; .reg .b128 %q<2>;"),
    ],
)
def test_a_module_with_more_in_it_is_refused(old: str, new: str) -> None:
    import assembly

    text = assembly._MODULE.format(body="", threads=32)
    assert text.count(old) == 1
    parse(text)
    with pytest.raises(Unsupported):
        parse(text.replace(old, new))


def test_a_program_without_an_instruction_keeps_the_places_of_the_others() -> None:
    program = program_of("LOOP: add.s32 %r1, %r1, 1; setp.lt.u32 %p1, %r1, 3; @%p1 bra LOOP;")
    at = [i.opcode for i in program.code].index("setp.lt.u32")
    shorter = program.without(at)
    assert shorter.labels == program.labels and len(shorter.code) == len(program.code)
    machine = Machine(shorter, [IN, OUT, 0], Memory("global", {}), shared=0)
    assert "setp" not in " ".join(i.opcode for i in machine.program.code)
