"""The architecture, read from the source: who may import whom, and the house's rules for files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Part -> the parts it is built on; it may import these and, through them, theirs. A part is a
# module or a subpackage of str_kernels; a new one is given its arrows here.
ARROWS: dict[str, set[str]] = {
    "contracts": set(),
    "atomic": set(),
    "parallel": set(),
    "projection": {"contracts", "parallel"},
    "penalties": {"contracts"},
    "checks": {"projection"},
    "eager": {"checks", "penalties"},
    "penalty_kernel": set(),
    "row_kernel": {"penalty_kernel"},
    "rows_torch": {"penalties", "parallel"},
    "rows_compiled": {"rows_torch", "projection"},
    "rows_triton": {"contracts", "penalties", "row_kernel"},
    "backends": {"checks", "rows_torch", "rows_compiled", "rows_triton"},
    "chunks": {"backends", "penalties", "projection"},
    "loss_args": {"backends"},
    "autograd": {"chunks", "eager"},
    "functional": {"autograd", "loss_args"},
    "tokenizer": set(),
    "text_files": set(),
    "frequency_match": set(),
    "token_fields": {"contracts"},
    "safety_tokens": {
        "checks",
        "atomic",
        "tokenizer",
        "text_files",
        "token_fields",
        "frequency_match",
    },
    "token_comparison": {"safety_tokens"},
    "reference": {"safety_tokens", "projection"},
    "cache_format": set(),
    "reference_cache": {"reference", "cache_format"},
    "reference_cache_writer": {"reference_cache", "atomic"},
    "evals": {"safety_tokens"},
    "modules": {"functional", "safety_tokens"},
    "loss_memory": {"functional"},
    "doctor": {"loss_memory", "backends"},
    "integrations": {"__init__", "modules", "loss_memory", "reference_cache_writer", "evals"},
    "cli": {"integrations", "doctor", "token_comparison"},
    "__main__": {"cli"},
    "__init__": {"modules", "reference_cache", "evals"},  # and integrations, inside __getattr__
}

# Part -> the only parts that may name it, however the arrows run.
ONLY_FOR: dict[str, set[str]] = {
    "rows_torch": {"backends", "rows_compiled"},
    "rows_compiled": {"backends"},
    "rows_triton": {"backends"},
    "row_kernel": {"rows_triton"},
    "penalty_kernel": {"row_kernel"},
    "backends": {"autograd", "chunks", "loss_args", "doctor"},
    "autograd": {"functional"},
}

# Imported inside functions only: they are heavy, or missing on some machines.
LAZY = {"rows_compiled", "rows_triton", "integrations"}
HEAVY = {"accelerate", "datasets", "gguf", "matplotlib", "peft", "transformers", "triton", "trl"}
MAY_BE_HEAVY = {
    "integrations": HEAVY - {"triton"},
    "rows_triton": {"triton"},
    "row_kernel": {"triton"},
    "penalty_kernel": {"triton"},
}

MAX_LINES = 400
VAGUE_NAME = re.compile(r"(^|_)(utils?|common|helpers?|misc)$")


class Import(NamedTuple):
    name: str  # dotted and absolute
    line: int
    lazy: bool  # inside a function or under `if TYPE_CHECKING`: importing the file does not run it
    relative: bool


def imports_in(tree: ast.Module, package: str, is_init: bool = False) -> Iterator[Import]:
    """Yield every import, `importlib.import_module("constant")` included."""

    def absolute(module: str, level: int) -> str:
        base = package.split(".")
        base = base[: len(base) - level + 1] if level else []
        return ".".join([*base, *filter(None, [module])])

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy, relative=False)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node.module or "", node.level)
            relative = node.level > 0
            if base == "str_kernels":  # the names may be its modules
                for alias in node.names:
                    yield Import(f"{base}.{alias.name}", node.lineno, lazy, relative)
            else:
                yield Import(base, node.lineno, lazy, relative)
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
            called = called.id if isinstance(called, ast.Name) else called
            name = node.args[0]
            if called in ("import_module", "__import__") and isinstance(name, ast.Constant):
                dots = len(name.value) - len(name.value.lstrip("."))
                module = absolute(name.value[dots:], dots)
                yield Import(module, node.lineno, lazy, relative=dots > 0)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            yield from visit(child, lazy or (typing_only and child not in node.orelse))

    return visit(tree, lazy=False)


def reachable(part: str) -> set[str]:
    found: set[str] = set()
    todo = [part]
    while todo:
        new = ARROWS[todo.pop()] - found
        found |= new
        todo += new
    return found


def part_of(module: str) -> str:
    """Name the part a module belongs to; `__init__` for a name that the package itself offers."""
    name = [*module.split("."), ""][1]
    return name if name in ARROWS else "__init__"


def problems(source: str, module: str, is_init: bool = False) -> list[str]:
    """Check one file of the package; module is its dotted name as imported."""
    part = part_of(module)
    if part == "__init__" and module != "str_kernels":
        return [f"{module}: not in ARROWS; give it its place there"]
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            found.append((node.lineno, "assert: python -O drops it; raise instead"))
    for name, line, lazy, relative in imports_in(
        tree, module if is_init else module.rpartition(".")[0]
    ):
        top = name.partition(".")[0]
        if top in ("bench", "tests", "integrations"):
            found.append((line, f"imports {top}, which is not in the package"))
        if top in HEAVY and not lazy and top not in MAY_BE_HEAVY.get(part, set()):
            found.append((line, f"imports {top} outside a function"))
        if top != "str_kernels":
            continue
        if not relative:
            found.append((line, f"imports {name} by its absolute name; write it relative"))
        other = part_of(name)
        if other == part:
            continue
        lazily_reachable = {"integrations"} if part == "__init__" else set()
        if other not in reachable(part) | lazily_reachable:
            found.append((line, f"{part} may not import {other}"))
        if part not in ONLY_FOR.get(other, {part}):
            found.append((line, f"{part} may not import {other}: that is for {ONLY_FOR[other]}"))
        if other in LAZY and not lazy:
            found.append((line, f"imports {other} outside a function"))
    return [f"{module}, line {line}: {text}" for line, text in sorted(found)]


def package_files() -> dict[str, Path]:
    files = {}
    for folder, package in (
        ("str_kernels", "str_kernels"),
        ("integrations", "str_kernels.integrations"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            files[".".join([package, *parts])] = path
    return files


def code_files() -> list[Path]:
    folders = ("str_kernels", "integrations", "bench", "tests")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("name", package_files())
def test_the_arrows_hold(name: str) -> None:
    module = name.removesuffix(".__init__")
    source = package_files()[name].read_text(encoding="utf-8")
    assert problems(source, module, is_init=module != name) == []


def test_every_arrow_belongs_to_a_part_that_can_be_named() -> None:
    assert set().union(*ARROWS.values(), ONLY_FOR, *ONLY_FOR.values()) <= set(ARROWS)
    for part in ARROWS:
        assert part not in reachable(part), f"{part} is built on itself"


@pytest.mark.parametrize("path", code_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_and_named_for_what_they_hold(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES, f"split it: {lines} lines"
    assert not VAGUE_NAME.search(path.stem), "name it after what it holds"


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, str_kernels\n"
        f"print(*sorted({HEAVY | {'typer', 'str_kernels.integrations'}!r} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (run.stdout.strip(), run.returncode) == ("", 0), run.stderr


# The checker itself: each rule must be able to fail, and must let the legal form pass.


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("checks", "from .functional import f", "checks may not import functional"),
        ("contracts", "from . import checks", "contracts may not import checks"),
        ("evals.drift", "from ..functional import f", "evals may not import functional"),
        ("evals.drift", "from .. import eager", "evals may not import eager"),
        ("functional", "def f():\n  from .modules import m", "may not import modules"),
        ("functional", "from .rows_torch import r", "functional may not import rows_torch"),
        ("autograd", "def f():\n  from . import rows_triton", "may not import rows_triton"),
        ("backends", "from .rows_triton import r", "rows_triton outside a function"),
        ("backends", "class A:\n  from .rows_triton import r", "rows_triton outside a function"),
        ("integrations.attach", "from ..autograd import a", "may not import autograd"),
        (
            "integrations.attach",
            "from str_kernels.rows_torch import r",
            "may not import rows_torch",
        ),
        ("integrations.attach", "import str_kernels.cli", "integrations may not import cli"),
        ("integrations.attach", "from integrations import x", "imports integrations"),
        ("modules", "from str_kernels.functional import f", "by its absolute name"),
        ("integrations.attach", "from str_kernels import modules", "by its absolute name"),
        ("modules", "from .integrations import attach", "modules may not import integrations"),
        ("modules", "import bench.speed", "imports bench"),
        ("cli", "from tests import x", "imports tests"),
        ("cli", "from .integrations import finetune", "integrations outside a function"),
        ("reference", "import transformers.models", "transformers outside a function"),
        ("reference", "if TYPE_CHECKING:\n  from .cli import c", "may not import cli"),
        ("reference", "if TYPE_CHECKING:\n  pass\nelse:\n  import peft", "peft outside"),
        ("integrations.attach", "import triton", "triton outside a function"),
        ("eager", "import importlib\nimportlib.import_module('.cli', 'x')", "may not import cli"),
        ("eager", "def f(x):\n  assert x", "line 2: assert"),
        ("brand_new", "import torch", "not in ARROWS"),
    ],
)
def test_the_checker_refuses(module: str, source: str, message: str) -> None:
    assert message in "; ".join(problems(source, f"str_kernels.{module}"))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("functional", "import torch\nfrom .autograd import a\nfrom .contracts import c"),
        ("backends", "def f():\n  from .rows_triton import r"),
        ("rows_triton", "import triton\nimport triton.language as tl"),
        ("integrations.attach", "import peft\nfrom .hf_models import m\nfrom ..modules import n"),
        ("integrations.attach", "from .. import SafetyTokens"),
        ("reference", "def f():\n  import transformers"),
        ("reference", "if TYPE_CHECKING:\n  from transformers import PreTrainedTokenizerBase"),
        ("evals.drift", "from ..safety_tokens import S\nfrom . import refusals"),
        ("cli", "import typer\ndef f():\n  from .integrations.finetune import g"),
    ],
)
def test_the_checker_allows(module: str, source: str) -> None:
    assert problems(source, f"str_kernels.{module}") == []


def test_the_checker_knows_a_package_from_a_module() -> None:
    assert problems("from .attach import a", "str_kernels.integrations", is_init=True) == []
    lazy = "def __getattr__(name):\n  from .integrations.attach import attach"
    assert problems(lazy, "str_kernels", is_init=True) == []
    assert problems("from .integrations import attach", "str_kernels", is_init=True) != []


@pytest.mark.parametrize("stem", ["utils", "test_utils", "common", "helpers", "io_helper"])
def test_vague_names_are_recognised(stem: str) -> None:
    assert VAGUE_NAME.search(stem)
    assert not VAGUE_NAME.search("commonly_refused")
