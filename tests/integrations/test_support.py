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


def test_cells_do_not_break_the_table() -> None:
    table = support._table(("a", "b"), [("1", support._cell("x | y\n<z>"))])
    assert table.splitlines() == ["| a | b |", "| --- | --- |", r"| 1 | x \| y &lt;z> |"]
