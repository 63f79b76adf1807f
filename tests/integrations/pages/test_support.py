"""docs/support.md is what the tests hold, and names tests that are there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
import support
import support_ranks
import support_trainers


def test_the_page_is_what_make_support_writes() -> None:
    assert support.PAGE.read_text(encoding="utf-8") == support.page(), "run `make support`"


@pytest.mark.parametrize("use", support.USES)
def test_each_use_has_its_test(use: str) -> None:
    assert _has(*support.USES[use].split("::"))


@pytest.mark.parametrize("test", support_trainers.tests())
def test_each_trainer_has_its_test(test: str) -> None:
    assert _has(*test.split("::"))


@pytest.mark.parametrize("setup", support_ranks.SETUPS)
def test_each_setup_has_its_test(setup: str) -> None:
    assert any(cell[0].isdigit() for cell in next(_rows_of(setup))[1:])
    test = support_ranks.SETUPS[setup][1].partition("[")[0]
    assert not test or _has(*test.split("::"))


def _rows_of(setup: str) -> Iterator[tuple[str, ...]]:
    return (row for row in support_ranks.rows() if row[0] == setup)


def test_every_run_on_ranks_is_in_the_table() -> None:
    names = [name for name, _ in support_ranks.SETUPS.values()]
    for _, call, _ in support_ranks.runs():
        assert sum(support_ranks._is_of(name, call) for name in names) == 1, call


def _has(file: str, name: str) -> bool:
    (path,) = support.TESTS.rglob(file)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_guide_counts_as_the_table_does() -> None:
    guide = (support.ROOT / "docs" / "attach.md").read_text(encoding="utf-8")
    rows = support._read(support.MODELS)
    for mapping in ("causal-lm", "image-text-to-text"):
        group = [row for row in rows if row["mapping"] == mapping]
        exact, logits = (sum(row[p] == "exact" for row in group) for p in ("linear", "logits"))
        absent = sum(row["linear"] == "not buildable" for row in group)
        counts = (exact, logits, len(group) - exact - logits - absent, absent)
        line = next(line for line in guide.splitlines() if line.startswith(f"| {len(group)} "))
        assert tuple(int(cell) for cell in line.split("|")[2:6]) == counts


def test_the_readme_counts_as_the_table_does() -> None:
    readme = (support.ROOT / "README.md").read_text(encoding="utf-8")
    line = next(line for line in readme.splitlines() if line.startswith("| models |"))
    rows = support._read(support.MODELS)
    exact, logits = (sum(row[path] == "exact" for row in rows) for path in ("linear", "logits"))
    absent = sum(row["linear"] == "not buildable" for row in rows)
    wanted = (len(rows), exact, logits, len(rows) - exact - logits - absent, absent)
    version = rows[0]["transformers"].rpartition(".")[0]
    said = re.sub(rf"transformers {re.escape(version)}\b", "", line)
    assert tuple(map(int, re.findall(r"\b\d+\b", said))) == wanted


def test_cells_do_not_break_the_table() -> None:
    table = support._table(("a", "b"), [("1", support._cell("x | y\n<z>"))])
    assert table.splitlines() == ["| a | b |", "| --- | --- |", r"| 1 | x \| y &lt;z> |"]
