"""The matrix of noxfile.py is what pyproject.toml promises, and its rows count every test."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.version import Version

from bench.compat import row_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def noxfile() -> ModuleType:
    pytest.importorskip("nox", reason="noxfile.py is read by nox, of the extra 'dev'")
    spec = importlib.util.spec_from_file_location("noxfile", ROOT / "noxfile.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_first_row_is_the_floors(noxfile: ModuleType) -> None:
    floors = noxfile.floors()
    for name, version in zip(noxfile.PACKAGES, noxfile.MATRIX[0], strict=True):
        assert Version(version) == Version(floors[name]), name  # 5.0.0 is 5.0
    assert {"numpy", "typer", "matplotlib"} <= set(floors) and "torch" not in floors


def test_the_rows_rise(noxfile: ModuleType) -> None:
    for column in zip(*noxfile.MATRIX, strict=True):
        assert list(column) == sorted(column, key=Version)


def test_a_row_counts_every_outcome(tmp_path: Path) -> None:
    (tmp_path / "test_outcomes.py").write_text(
        "import pytest\n"
        "def test_passes(): pass\n"
        "def test_passes_too(): pass\n"
        "def test_fails(): assert False\n"
        "def test_is_skipped(): pytest.skip('why')\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError\n"
        "def test_errs(broken): pass\n",
        encoding="utf-8",
    )
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}"]
    subprocess.run([*command, tmp_path], capture_output=True, cwd=tmp_path, check=False)
    row = row_of(report, ["pytest"])
    assert (row["passed"], row["failed"], row["skipped"]) == (2, 2, 1)
    assert row["pytest"] == pytest.__version__ and row["python"] and row["torch"]
