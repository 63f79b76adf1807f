"""Modules with one piece of their source changed, to show that a test can fail.

A piece is found by what it says, not by how it is laid out: comments, line ends and parentheses
without a meaning are not part of it.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple


class Change(NamedTuple):
    """One expression, or one or more statements in a row, and what stands there instead.

    Attributes:
        old: Python, which must be there exactly once.
        new: Python.
        inside: the function that is looked through; the whole module when empty.
    """

    old: str
    new: str
    inside: str = ""


# Of row_kernel, for more than one test. What stands beside a barrier says which of them it is.
_FACTOR = "factor = (of_ce + extra * logit_scale) * inv_d"
_STORE_Y = "tl.store(Grad + y, du_y, mask=inside)"
NO_FIRST_BARRIER = Change(f"{_FACTOR}; tl.debug_barrier()", _FACTOR)
NO_SECOND_BARRIER = Change(f"tl.debug_barrier(); {_STORE_Y}", _STORE_Y)
NARROW_ROW_INDEX = Change("tl.program_id(0).to(tl.int64)", "tl.program_id(0)", "row_step_kernel")


def changed(source: str, change: Change | None) -> str:
    """Return a source with a change made, and without its comments."""
    tree = ast.parse(source)
    if change is not None:
        replace = _Replace(change)
        parts: list[ast.AST] = [tree]
        if change.inside:
            functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
            parts = [function for function in functions if function.name == change.inside]
        for part in parts:
            replace.visit(part)
        if replace.places != 1:
            raise ValueError(f"`old` must be in one place; got {replace.places} of {change}")
    return ast.unparse(tree)


def load_changed(name: str, folder: Path, change: Change | None = None) -> ModuleType:
    """Load a module's source anew, changed, as a module beside it.

    Args:
        name: of the module, in full.
        folder: gets the file, from which Triton reads a kernel's source.
        change: None for the source as it is.

    Returns:
        The module; `sys.modules` does not have it.
    """
    original = importlib.util.find_spec(name)
    assert original is not None and original.origin is not None
    source = changed(Path(original.origin).read_text(encoding="utf-8"), change)
    path = folder / f"{name.rpartition('.')[2]}_changed.py"
    path.write_text(source, encoding="utf-8")
    package = name.rpartition(".")[0]  # to which its imports are relative
    spec = importlib.util.spec_from_file_location(f"{package}.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules.pop(spec.name, None)
    return module


class _Replace(ast.NodeTransformer):
    """Replace what unparses to the same text as `old`, and count it."""

    def __init__(self, change: Change) -> None:
        old, self._new = ast.parse(change.old).body, ast.parse(change.new).body
        self._old = [ast.unparse(statement) for statement in old]
        self._is_expression = all(
            len(code) == 1 and isinstance(code[0], ast.Expr) for code in (old, self._new)
        )
        self.places = 0

    def visit(self, node: ast.AST) -> ast.AST:
        if self._is_expression and isinstance(node, ast.expr) and [ast.unparse(node)] == self._old:
            self.places += 1
            return self._new[0].value  # type: ignore[attr-defined] # an Expr, see above
        return self.generic_visit(node)

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if not self._is_expression:
            for name in ("body", "orelse", "finalbody"):
                block = getattr(node, name, None)
                if isinstance(block, list):  # of a lambda the body is an expression
                    setattr(node, name, self._replace_in(block))
        return node

    def _replace_in(self, block: list[ast.stmt]) -> list[ast.stmt]:
        texts, length = [ast.unparse(statement) for statement in block], len(self._old)
        for start in range(len(block) - length + 1):
            if texts[start : start + length] == self._old:
                self.places += 1
                block = [*block[:start], *self._new, *block[start + length :]]
        return block
