"""The house's rules that no linter has; which folder may import which is in pyproject.toml."""

from __future__ import annotations

import glob
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

import str_kernels

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("str_kernels", "integrations", "bench", "examples", "tests")
CODE = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
HEAVY = ("accelerate", "datasets", "gguf", "matplotlib", "peft", "transformers", "triton", "trl")

MAX_LINES = 400
MAX_FILES = 12
RUNS_WHAT_IT_READS = re.compile(
    r"(import|from) (c?pickle|dill|joblib|marshal|shelve)\b|\btorch\.load\(|(?<![\w.])(eval|exec)\("
    r"|trust_remote_code=True|allow_pickle=True|shell=True|os\.system\(|yaml\.(unsafe_)?load\("
)
VAGUE_NAME = re.compile(r"(^|_)(utils?|common|helpers?|misc)$")


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_short_and_named_for_what_it_holds(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES, f"split it: {lines} lines"
    assert not VAGUE_NAME.search(path.stem), "name it after what it holds"


def test_a_folder_has_few_files() -> None:
    files = Counter(path.parent.relative_to(ROOT) for path in CODE if path.name != "__init__.py")
    assert {str(folder): n for folder, n in files.items() if n > MAX_FILES} == {}


@pytest.mark.parametrize("stem", ["utils", "test_utils", "common", "helpers", "io_helper"])
def test_vague_names_are_recognised(stem: str) -> None:
    assert VAGUE_NAME.search(stem)
    assert not VAGUE_NAME.search("commonly_refused")


@pytest.mark.parametrize("folder", ["str_kernels", "integrations"])
def test_the_package_runs_nothing_that_it_reads(folder: str) -> None:
    for path in (path for path in CODE if path.is_relative_to(ROOT / folder)):
        found = RUNS_WHAT_IT_READS.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path.relative_to(ROOT)}: {found and found[0]}"


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "torch.load(x)",
        "eval(text)",
        "f(trust_remote_code=True)",
        "run(shell=True)",
    ],
)
def test_what_would_run_it_is_recognised(line: str) -> None:
    assert RUNS_WHAT_IT_READS.search(line)
    assert not RUNS_WHAT_IT_READS.search("model.eval()  # weights in a pickle are not read")


def test_every_place_that_states_the_version_states_the_same() -> None:
    change = re.search(r"^## \[(.+)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    cited = re.search(r"^version: (.+)\ndate-released: (.+)$", citation, re.M)
    assert change and cited and cited.groups() == change.groups()
    assert cited[1] == str_kernels.__version__


def test_the_tests_that_the_security_page_names_are_there() -> None:
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text("utf-8") for path in CODE if path.is_relative_to(ROOT / "tests"))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 15
    assert {name for name in named if f"def {name}(" not in tests} == set()
    assert {
        path for path in re.findall(r"`(tests/[\w/.]+)`", page) if not (ROOT / path).exists()
    } == (set())


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import str_kernels", {*HEAVY, "typer", "str_kernels.integrations"}),
        ("from str_kernels.cli import app", {*HEAVY}),
        # torch.compile looks for triton
        ("from str_kernels import AnchorPrompts, attach", {*HEAVY} - {"triton"}),
    ],
    ids=["package", "help", "attach"],
)
def test_an_import_loads_nothing_heavy(code: str, absent: set[str]) -> None:
    code += f"\nimport sys\nprint(*sorted({absent!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (run.stdout.strip(), run.returncode) == ("", 0), run.stderr


def test_every_file_that_is_no_code_is_shipped() -> None:
    """By pyproject.toml's package-data: a file without its line is missing from the wheel alone."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    shipped = set()
    for package, patterns in settings["tool"]["setuptools"]["package-data"].items():
        folder = ROOT / package.replace(".", "/")
        for pattern in patterns:
            found = glob.glob(pattern, root_dir=folder, recursive=True)
            shipped |= {(folder / name).resolve() for name in found if (folder / name).is_file()}
    there = {
        path.resolve()
        for folder in ("str_kernels", "integrations")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert there == shipped
