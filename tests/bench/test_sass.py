"""Instructions counted in compiled kernels: the counter itself, and the bounds of ours."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
from bench_runs import run_apart

pytest.importorskip("triton", reason="an optional dependency outside Linux")
pytest.importorskip("triton.backends.nvidia", reason="this Triton compiles for no NVIDIA GPU")
from bench.compiled import sass

SASS = """
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;  /* 0x00000a00ff017b82 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 FFMA R4, R4, R5, R6 ;
        /*0030*/                   FMNMX R4, R4, R5, !PT ;
        /*0040*/                   LDG.E.U16 R8, desc[UR4][R2.64] ;
        /*0050*/                   MUFU.EX2 R4, R4 ;
        /*0060*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*0070*/               @P1 BRA 0x20 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
        /*00a0*/                   NOP;
"""


def print_code(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let cuobjdump print this."""
    done = subprocess.CompletedProcess([], 0, stdout=text)
    monkeypatch.setattr(sass.subprocess, "run", lambda *args, **kwargs: done)


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    print_code(SASS, monkeypatch)


def test_a_loop_is_what_a_branch_goes_back_over(listed: None) -> None:
    (loop,) = sass.loops(b"")
    pipes = {"fma": 1, "alu": 1, "memory": 1, "mufu": 1, "uniform": 1, "control": 1}
    assert loop == sass.Counts(6, pipes, loop.names, 2)
    assert loop.names["FMNMX"] == 1


def test_all_the_code_ends_where_it_ends(listed: None) -> None:
    counts = sass.whole(b"")
    assert (counts.instructions, counts.loaded) == (9, 18)


def test_the_first_user_of_a_shuffled_number(monkeypatch: pytest.MonkeyPatch) -> None:
    text = SASS.replace("LDG.E.U16 R8, desc[UR4][R2.64]", "SHFL.BFLY PT, R5, R4, 0x10, 0x1f")
    text = text.replace("MUFU.EX2 R4, R4", "FADD R4, R4, -R5")
    print_code(text, monkeypatch)
    assert sass.shuffled(b"") == {"FADD": 1}


def test_another_form_of_listing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    print_code("nothing known", monkeypatch)
    with pytest.raises(ValueError, match="its form has changed"):
        sass.loops(b"")


@pytest.fixture(scope="module")
def counted() -> dict[str, dict[str, Any]]:
    return {row["what"]: row for row in json.loads(run_apart("-m", "bench", "sass", "--json"))}


def test_each_case_has_its_passes(counted: dict[str, dict[str, Any]]) -> None:
    for name, (path, *_) in sass.CASES.items():
        row = counted[f"ours, {name}"]
        alone = "held" in name or path != "linear"
        assert len(row["passes"].split(" + ")) == (1 if alone else 2), row
        assert row["instructions"] * 0.9 < row["of_row"] < row["instructions"] * 1.35, row
        assert row["fused_sums"] == 0, row


# What they are is in the README; another compiler may need a few more.
@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("bf16", 15),
        ("bf16, V odd, padded", 15),
        ("fp16", 15),
        ("fp32", 13.5),
        ("bf16, held", 24),
        ("bf16, all options", 62),
        ("bf16, all options, V odd, padded", 62),
    ],
)
def test_no_logit_costs_more_than_it_did(name, most, counted: dict[str, dict[str, Any]]) -> None:
    assert counted[f"ours, {name}"]["instructions"] <= most
    if "Liger, cross-entropy, bf16" in counted and name == "bf16":
        liger = counted["Liger, cross-entropy, bf16"]["instructions"]
        assert counted["ours, bf16"]["instructions"] <= 0.75 * liger
