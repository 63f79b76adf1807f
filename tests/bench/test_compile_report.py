"""The report on compiled kernels: what it covers, how it judges, how it goes on after a break."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from bench_runs import run_apart

pytest.importorskip("triton", reason="an optional dependency outside Linux")
pytest.importorskip("triton.backends.nvidia", reason="this Triton compiles for no NVIDIA GPU")
from bench.compiled import compile_report
from bench.compiled.compile_report import every_variant, report, sample, summary
from bench.compiled.compiling import TARGETS, Variant

CODE = {
    "seconds": 0.5, "shared": 32, "registers": 40, "spills": {"STACK": 0, "LOCAL": 0},
    "num_warps": 8, "num_ctas": 1, "block": 4096, "on_chip": False,
    "row_loads": 64, "row_stores": 32, "wide_loads": 64, "wide_stores": 32,
}  # fmt: skip
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
    monkeypatch.setattr(compile_report, "HAS_CLUSTERS", False)
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
    assert values((v for v in every if v.path == "cluster"), "target") == {"sm_90", "sm_100"}


def test_each_code_is_compiled_once(made) -> None:
    variants = [LINEAR, LINEAR._replace(vocab=32000), LINEAR._replace(vocab=50257)]
    total = []
    rows = report([*variants, LINEAR._replace(path="cluster")], started=total.append)
    assert (made["count"], total) == (2, [2])
    assert [row["status"] for row in rows] == ["needs Triton 3.8", "compiled", "compiled"]
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


def test_a_row_that_no_cluster_holds_is_said(made, monkeypatch) -> None:
    def refuse(variant: Variant) -> None:
        raise ValueError("`backend` must be one that can hold a row: ...")

    monkeypatch.setattr(compile_report, "HAS_CLUSTERS", True)
    monkeypatch.setattr(compile_report, "launch_of", refuse)
    (row,) = report([LINEAR._replace(path="cluster")])
    assert row["status"] == "fits no cluster"


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
    first, *runs = json.loads(run_apart("-c", program, code=code))
    assert first["spilt"] is bool(spills) and first["registers"] > 0 and first["triton"]
    assert {row["status"] for row in runs} == {"counted"} and not any(row["bad"] for row in runs)
    assert (tmp_path / "compile.csv").read_text().count("\n") == 2 + len(runs)
