"""`make gpu`'s table: which sizes, what is judged, what is written; on the CPU at toy sizes."""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.gpu import SIZES, TARGET_SIZES, Size, measure_size, run, table
from bench.results import append_rows, read_rows

TOY = [Size(40, 16, 333)]
ROOT = Path(gpu.__file__).parents[1]


class Clock:
    """Seconds that pass when a size is measured."""

    def __init__(self, per_work: float) -> None:
        self.now, self.per_work = 100.0, per_work
        self.measured: list[tuple[Size, bool]] = []

    def __call__(self) -> float:
        return self.now

    def measure(self, size: Size, with_compile: bool) -> list[dict]:
        self.measured.append((size, with_compile))
        self.now += self.per_work * size.work
        return [{"N": size.tokens}]


def test_the_targets_come_first_and_every_size_once():
    assert SIZES[:2] == TARGET_SIZES and set(TARGET_SIZES) == {
        (8192, 4096, 128256),
        (8192, 4096, 151936),
    }
    assert len(set(SIZES)) == len(SIZES) == 3 * 2 * 4
    assert [s.work for s in SIZES[2:]] == sorted(s.work for s in SIZES[2:])


def test_sizes_end_before_the_deadline_and_those_left_out_are_named():
    clock = Clock(per_work=4e-12)
    rows, left_out = run(SIZES, 100.0, measure_size=clock.measure, clock=clock)
    assert [size for size, compiled in clock.measured if compiled] == [*TARGET_SIZES]
    assert 50 < clock.now - 100 <= 100
    assert len(rows) + len(left_out) == len(SIZES) and rows and left_out
    assert any(line.startswith("N 16384, D 4096, V 262144: no time") for line in left_out)


def test_a_size_that_fails_leaves_the_others():
    def measure(size, with_compile):
        if size.vocab == 128256:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return [{"V": size.vocab}]

    kept: list[dict] = []
    rows, left_out = run(TARGET_SIZES, 9.0, measure_size=measure, keep=kept.extend)
    assert rows == kept == [{"V": 151936}]
    assert left_out == ["N 8192, D 4096, V 128256: OutOfMemoryError: CUDA out of memory. Tried"]


@pytest.fixture(scope="module")
def rows():
    size = functools.partial(measure_size, device="cpu", count=2)
    return run(TOY, measure_size=lambda s, _: size(s, False))[0]


def test_the_rows_of_a_size(rows, tmp_path):
    frozen = [row for row in rows if row.get("train_head") is False]
    trained = [row for row in rows if row.get("train_head") is True]
    names = {row["provider"] for row in frozen}
    assert names == {row["provider"] for row in trained}
    assert {"eager", "F.linear_cross_entropy", "Liger", "CCE", "bare products"} < names
    assert "ours (torch)" in names and "torch.compile" not in names
    judged = [row for row in rows if row["target"]]
    assert [row["provider"] for row in judged] == ["ours (torch)", "ours, logits path"]
    path = gpu.csv_of("NVIDIA H100 80GB (HBM3)", tmp_path / "new")
    assert path.name == "nvidia-h100-80gb-hbm3.csv"
    append_rows(path, rows)
    assert len(read_rows(path)) == len(rows)
    text = table(rows, ["N 1, D 1, V 1: no time, 0 s were left"])
    assert "of copy" in text and "left out: N 1, D 1, V 1" in text
    assert "absent" in text and "needs a GPU" in text


def test_targets_are_met_or_not():
    row = {"status": "timed", "against_products": 1.15, "peak_bytes": None}
    size = Size(8192, 4096, 128256)
    chunk = gpu.rows_per_chunk(torch.empty(0, 4096, dtype=torch.bfloat16), 128256, None)
    chunk_bytes, gradient = chunk * 128256 * 2, 8192 * 4096 * 2
    target = functools.partial(gpu._linear_target, size=size, device="cpu")
    assert target(row) == "met: time 1.15 <= 1.15"
    assert target(row | {"against_products": 1.2}) == "NOT met: time 1.20 <= 1.15"
    for share, said in ((1.19, "; met: peak/chunk 1.19"), (1.21, "; NOT met: peak/chunk 1.21")):
        peak = gradient + int(share * chunk_bytes)
        assert said in target(row | {"peak_bytes": peak})
    assert target({"status": "wrong"}) == "not met: wrong"
    assert gpu._judge("of copy", 0.84, ">=", 0.85).startswith("NOT met")
    assert gpu._judge("of copy", 0.86, ">=", 0.85).startswith("met")


def test_needs_torch_alone():
    """What `make gpu` imports at import time, through bench: the standard library, torch, ours."""
    seen, todo = set(), ["bench.gpu"]
    while todo:
        module = todo.pop()
        seen.add(module)
        spec = importlib.util.find_spec(module)
        for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom):
                named = "." * node.level + (node.module or "")
                name = importlib.util.resolve_name(named, spec.parent)
                inner = [f"{name}.{alias.name}" for alias in node.names] if node.level else []
                found = [one for one in inner if (ROOT / f"{one.replace('.', '/')}.py").exists()]
                names = found or [name]
            else:
                names = [alias.name for alias in getattr(node, "names", [])]
            for name in names:
                top = name.partition(".")[0]
                assert top in {"torch", "str_kernels", "bench"} | sys.stdlib_module_names, name
                todo += [name] * (top == "bench" and name not in seen)
    assert {"bench.steps.speed", "bench.check", "bench.steps.providers", "bench.results"} <= seen
