"""`python -m bench execute`: the counts, the assembly that is read, and the bounds made of them."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter

import pytest
from bench_runs import run_apart

pytest.importorskip("triton", reason="an optional dependency outside Linux")
from bench.compiled import sass
from bench.compiled.amdgcn import Instruction, amdgcn_of, amdgcn_per_logit, loops_of

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("triton.backends.nvidia") is None
    or importlib.util.find_spec("triton.backends.amd") is None,
    reason="this build of Triton lacks the compiler for one of the two makers",
)


def code(*names: str, back: dict[int, int]) -> list[Instruction]:
    return [Instruction(16 * n, name, back.get(n)) for n, name in enumerate(names)]


def test_a_loop_is_what_lies_between_a_branch_back_and_its_target() -> None:
    straight = code("LDG", "FADD", "BRA", "EXIT", back={2: 48})
    assert loops_of(straight) == []
    two = code("S2R", "LDG", "BRA", "FADD", "FMUL", "BRA", "EXIT", back={2: 16, 5: 48})
    assert [[i.opcode for i in body] for body in loops_of(two)] == [
        ["LDG", "BRA"],
        ["FADD", "FMUL", "BRA"],
    ]
    # one loop with two branches to its head, and one inside another
    nested = code("A", "B", "BRA", "C", "BRA", "D", "BRA", back={2: 16, 4: 16, 6: 0})
    assert [len(body) for body in loops_of(nested)] == [7]


def test_instructions_have_their_pipes() -> None:
    for name, pipe in (
        ("FFMA", "fma"), ("FADD.FTZ", "fma"), ("IMAD.MOV.U32", "fma"), ("FFMA2", "fma"),
        ("MUFU.EX2", "mufu"), ("FMNMX", "alu"), ("ISETP.GE.AND", "alu"), ("SEL", "alu"),
        ("LDG.E.128", "memory"), ("SHFL.BFLY", "memory"), ("BRA", "control"),
        ("R2UR", "uniform"),
    ):  # fmt: skip
        assert sass.Instruction(0, name, "").pipe == pipe, name
    counted = sass.Counts.of([sass.Instruction(0, x, "") for x in ("MUFU.EX2", "FFMA2", "BRA")])
    assert counted.instructions == 3
    assert counted.pipes == {"mufu": 1, "fma": 2, "control": 1}  # a pair is two


def test_amd_code_is_read_up_to_its_end() -> None:
    text = """
f:
	s_load_dwordx2 s[0:1], s[2:3], 0x0
.LBB0_1:                                ; %loop
	v_exp_f32_e32 v1, v2
	v_pk_fma_f32 v[2:3], v[4:5], v[6:7], v[8:9]
	buffer_load_dwordx4 v[0:3], v5, s[20:23], 0 offen
	s_cbranch_scc1 .LBB0_1
	s_endpgm
	v_exp_f32_e32 v1, v2
"""
    found = amdgcn_of(text)
    assert loops_of(found)[0][0].opcode == "v_exp_f32_e32" and len(found) == 5
    assert amdgcn_per_logit(found, 2, held=False) == {"vector": 1.0, "transcendental": 0.5}
    of_zeros = amdgcn_of(text.replace("buffer_load", "buffer_store"))  # of a row without loss
    assert amdgcn_per_logit(of_zeros, 2, held=False) == {}


@needs_compiler
def test_the_bound_is_the_slowest() -> None:
    from bench.compiled.execute import Device, bounds

    device = Device("sm_90", bytes=4e12, lanes=32e12, source="")
    slow = Counter({"issue": 32.0, "alu": 8.0, "mufu": 1.0})
    row = bounds("X", device, moved=2.0, counted=slow)
    assert (row["X bound"], row["X pipe"]) == ("issue", "issue")
    assert row["X memory ps"] == pytest.approx(0.5) and row["X pipe ps"] == pytest.approx(1.0)
    # 16 of 128 lanes make exponentials: 3 of them take as long as 24 instructions
    row = bounds("X", device, moved=2.0, counted=Counter({"issue": 16.0, "mufu": 3.0}))
    assert (row["X bound"], row["X ratio"]) == ("mufu", pytest.approx(1.5))
    assert bounds("X", device, moved=8.0, counted=slow)["X bound"] == "memory"
    amd = bounds("X", device, moved=2.0, counted=Counter({"vector": 4.0, "transcendental": 5.0}))
    assert amd["X bound"] == "transcendental"


@needs_compiler
def test_the_command_counts_ours_and_liger_s(tmp_path) -> None:
    """In a process of its own, whose kernels are not interpreted."""
    more = ["--json", "--save", "--results", tmp_path]
    rows = json.loads(run_apart("-m", "bench", "execute", "--small", "--target", "sm_90", *more))
    assert [row["kernel"] for row in rows[:1]] == ["ours"] and "kernel" in (
        tmp_path / "execute.csv"
    ).read_text()
    ours = rows[0]
    # float32, held: each logit is read once and its gradient written once, 8 bytes; the ids'
    # columns lie alone in their sectors
    assert ours["held"] and 8.0 < ours["moved"] < 9.0 and 0.5 < ours["used"] < 1.0
    assert 20 < ours["ptx"] < 80 and 20 < ours["sass"] < 80 and 2 < ours["sass mufu"] < 4
    assert ours["ptx ex2"] == pytest.approx(2.0, abs=0.3)  # in each pass one, and some for sums
    assert ours["barriers"] > 4 and "No time was measured" in ours["protocol"]
    if importlib.util.find_spec("liger_kernel") is not None:
        liger = rows[1]
        assert 6.0 <= liger["moved"] < 6.1  # bfloat16: two reads and a write
