"""docs/support.md is what the tests hold, and names tests that are there."""

from __future__ import annotations

import ast

import pytest
import support


def test_the_page_is_what_make_support_writes() -> None:
    assert support.PAGE.read_text(encoding="utf-8") == support.page(), "run `make support`"


@pytest.mark.parametrize("use", support.USES)
def test_each_use_has_its_test(use: str) -> None:
    file, name = support.USES[use].split("::")
    tree = ast.parse((support.HERE / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_readme_counts_as_the_table_does() -> None:
    readme = (support.ROOT / "README.md").read_text(encoding="utf-8")
    rows = support._read(support.MODELS)
    for mapping in ("causal-lm", "image-text-to-text"):
        group = [row for row in rows if row["mapping"] == mapping]
        exact, logits = (sum(row[p] == "exact" for row in group) for p in ("linear", "logits"))
        absent = sum(row["linear"] == "not buildable" for row in group)
        counts = (exact, logits, len(group) - exact - logits - absent, absent)
        line = next(line for line in readme.splitlines() if line.startswith(f"| {len(group)} "))
        assert tuple(int(cell) for cell in line.split("|")[2:6]) == counts


def test_cells_do_not_break_the_table() -> None:
    table = support._table(("a", "b"), [("1", support._cell("x | y\n<z>"))])
    assert table.splitlines() == ["| a | b |", "| --- | --- |", r"| 1 | x \| y &lt;z> |"]
