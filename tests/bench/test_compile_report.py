"""The report on compiled kernels: what it covers, how it judges, how it goes on after a break."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="an optional dependency outside Linux")
pytest.importorskip("triton.backends.nvidia", reason="this Triton compiles for no NVIDIA GPU")
from bench.compiled import compile_report
from bench.compiled.compile_report import every_variant, report, sample, summary
from bench.compiled.compiling import TARGETS, Variant

ROOT = Path(__file__).parents[2]
CODE = {
    "seconds": 0.5,
    "shared": 32,
    "registers": 40,
    "spills": {"STACK": 0, "LOCAL": 0},
    "num_warps": 8,
    "block": 4096,
    "on_chip": False,
    "row_loads": 64,
    "row_stores": 32,
    "wide_loads": 64,
    "wide_stores": 32,
}
LINEAR = Variant("linear", "bfloat16", 128256, 64, "mse", False, "sm_90")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """No compiler: every code is CODE, changed by what a test puts here, and is named by itself."""
    changes: dict[str, Any] = {}

    class Code:
        def __init__(self, variant: Variant, target: object) -> None:
            self.key = f"{variant.path} {variant.vocab % 16 == 0}"

    def compile_and_examine(code: Code) -> dict[str, Any]:
        changes["count"] = changes.get("count", 0) + 1
        return CODE | {name: value for name, value in changes.items() if name != "count"}

    monkeypatch.setattr(compile_report, "launch_of", lambda variant: variant)
    monkeypatch.setattr(compile_report, "specialize", Code)
    monkeypatch.setattr(compile_report, "compile_and_examine", compile_and_examine)
    return changes


def values(variants: Iterable[Variant], field: str) -> set[Any]:
    return {getattr(variant, field) for variant in variants}


def test_the_sample_has_some_of_everything() -> None:
    some, every = list(sample()), list(every_variant())
    assert set(some) <= set(every) and len(some) < 300 < len(set(every)) == len(every)
    for field in ("path", "dtype", "kind", "everything", "target", "large"):
        assert values(some, field) == values(every, field), field
    assert values(every, "target") == set(TARGETS)
    assert values(every, "vocab") == set(compile_report.VOCABS)
    assert values((v for v in every if v.path == "scatter"), "target") == {"gfx942"}


def test_each_code_is_compiled_once(made) -> None:
    variants = [LINEAR, LINEAR._replace(vocab=32000), LINEAR._replace(vocab=50257)]
    total = []
    rows = report(variants, started=total.append)
    assert (made["count"], total) == (2, [2])
    assert [row["status"] for row in rows] == ["compiled", "compiled"]
    assert not any(row.get("bad") for row in rows)
    assert sum(row["codes"] for row in summary(rows)) == 2


@pytest.mark.parametrize(
    ("changes", "spilt", "narrow"),
    [
        ({"spills": {"STACK": 8, "LOCAL": 0}}, True, False),
        ({"spills": {"vgpr_spill_count": 0, "sgpr_spill_count": 3}}, True, False),
        ({"wide_loads": 32}, False, True),
        ({"wide_stores": 0}, False, True),
    ],
)
def test_what_may_not_be_shipped(made, changes, spilt, narrow) -> None:
    made.update(changes)
    odd = LINEAR._replace(path="backward", vocab=50257)  # its rows are not aligned
    for variant, aligned in ((LINEAR, True), (LINEAR._replace(vocab=50257), True), (odd, False)):
        (row,) = report([variant])
        assert row["spilt"] is spilt and row["narrow"] is (narrow and aligned)
        assert row["bad"] is (spilt or (narrow and aligned))
    (row,) = summary(report([LINEAR]))
    assert (row["spilt"], row["narrow"]) == (spilt, narrow)


def test_it_goes_on_where_it_was(made, tmp_path) -> None:
    lines = tmp_path / "new" / "lines.jsonl"
    first = report([LINEAR], lines=lines)
    with lines.open("a") as file:
        file.write('{"key": "cut o')
    variants = [LINEAR, LINEAR._replace(vocab=50257)]
    with lines.open("a") as file:
        file.write("\n")
    again = report(variants, lines=lines)
    assert made["count"] == 2
    assert again[0] == first[0] and len(again) == 2
    assert len(lines.read_text().splitlines()) == 3


@pytest.mark.parametrize(("spills", "code"), [(0, 0), (8, 1)])
def test_the_command(spills: int, code: int, tmp_path) -> None:
    """With one variant, compiled in earnest but for the number of spills."""
    program = (
        "import sys, bench.compiled.compile_report as r\n"
        "from bench.compiled.compiling import Variant\n"
        "real = r.compile_and_examine\n"
        f"r.compile_and_examine = lambda code: real(code) | {{'spills': {{'STACK': {spills}}}}}\n"
        f"r.sample = lambda: [Variant(*{tuple(LINEAR)!r})]\n"
        "from bench.__main__ import app\n"
        f"app(['compile', '--json', '--save', '--results', {str(tmp_path)!r}])\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, cwd=ROOT
    )
    assert run.returncode == code, run.stderr[-3000:]
    first, *runs = json.loads(run.stdout)
    assert first["spilt"] is bool(spills) and first["registers"] > 0 and first["triton"]
    assert {row["status"] for row in runs} == {"counted"} and not any(row["bad"] for row in runs)
    assert (tmp_path / "compile.csv").read_text().count("\n") == 2 + len(runs)


def test_an_interpreting_process_is_told_so() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "bench", "compile"]
    run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert run.returncode == 2 and "TRITON_INTERPRET" in run.stderr
