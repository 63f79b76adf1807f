"""Instructions counted in compiled kernels: the counter itself, and the bounds of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="an optional dependency outside Linux")
pytest.importorskip("triton.backends.nvidia", reason="this Triton compiles for no NVIDIA GPU")
from bench import sass

ROOT = Path(__file__).parents[1]
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


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 0, stdout=SASS)
    monkeypatch.setattr(sass.subprocess, "run", lambda *args, **kwargs: done)


def test_a_loop_is_what_a_branch_goes_back_over(listed: None) -> None:
    (loop,) = sass.loops(b"")
    pipes = {"fma": 1, "alu": 1, "memory": 1, "mufu": 1, "uniform": 1, "control": 1}
    assert loop == sass.Counts(6, pipes, loop.names, 2)
    assert loop.names["FMNMX"] == 1


def test_all_the_code_ends_where_it_ends(listed: None) -> None:
    counts = sass.whole(b"")
    assert (counts.instructions, counts.loaded) == (9, 18)


def test_another_form_of_listing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 0, stdout="nothing known")
    monkeypatch.setattr(sass.subprocess, "run", lambda *args, **kwargs: done)
    with pytest.raises(ValueError, match="its form has changed"):
        sass.loops(b"")


@pytest.fixture(scope="module")
def counted() -> dict[str, dict[str, object]]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "sass", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-3000:]
    return {row["what"]: row for row in json.loads(run.stdout)}


def test_each_case_has_its_passes(counted: dict[str, dict[str, object]]) -> None:
    for name, (path, *_) in sass.CASES.items():
        row = counted[f"ours, {name}"]
        passes = str(row["passes"]).split(" + ")
        alone = "held" in name or path != "linear"
        assert len(passes) == (1 if alone else 2), row


def test_an_interpreting_process_is_told_so() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "bench", "sass"]
    run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert run.returncode == 2 and "TRITON_INTERPRET" in run.stderr
