"""The tree for the `kernels` library: what it holds, and its build beside the package."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import str_kernels
from bench.hub import write_tree

ROOT = Path(__file__).parents[2]
CHILD = Path(__file__).with_name("hub_child.py")
# A development environment has none: where it is, transformers fetches kernels from the hub.
NEEDS_KERNELS = pytest.mark.skipif(
    not any(importlib.metadata.distributions(name="kernels")),
    reason="needs the package kernels: `make release-check` has it",
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    write_tree(folder)
    return folder


def beside_the_package(folder: Path, by: str = "importlib") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(CHILD), str(folder), by], capture_output=True, text=True, cwd=ROOT
    )


@pytest.mark.parametrize("by", ["importlib", pytest.param("kernels", marks=NEEDS_KERNELS)])
def test_it_computes_what_the_package_does_by_ops_of_its_own(tree: Path, by: str) -> None:
    done = beside_the_package(tree, by)
    assert done.returncode == 0, done.stderr
    name, of_the_kernel, of_the_package = json.loads(done.stdout.splitlines()[-1])
    assert re.fullmatch(r"_str_kernels_cpu_[0-9a-f]{12}", name)
    assert (of_the_kernel, of_the_package) == ([name], ["str_kernels"])


def test_a_namespace_that_both_have_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    write_tree(folder)
    ops = folder / "build" / "torch-cpu" / "_ops.py"
    ops.write_text(re.sub(r"_str_kernels_cpu_\w+", "str_kernels", ops.read_text("utf-8")), "utf-8")
    done = beside_the_package(folder)
    spaces = done.stdout.splitlines()[-1:]
    assert done.returncode != 0 or json.loads(spaces[0])[1] == ["str_kernels"]


def test_the_sources_are_the_packages(tree: Path) -> None:
    ours = Path(str_kernels.__file__).parent / "op"
    copied = tree / "torch-ext" / "str_kernels" / "op"
    names = sorted(path.relative_to(ours) for path in ours.rglob("*.py"))
    assert sorted(path.relative_to(copied) for path in copied.rglob("*.py")) == names
    for name in names:
        assert (copied / name).read_bytes() == (ours / name).read_bytes(), name


@pytest.mark.parametrize("backend", ["cpu", "cuda", "rocm", "xpu"])
def test_a_build_is_what_its_metadata_says(tree: Path, backend: str) -> None:
    build = tree / "build" / f"torch-{backend}"
    metadata = json.loads((build / "metadata.json").read_text("utf-8"))
    assert metadata["backend"] == {"type": backend} and metadata["name"] == "str-kernels"
    assert metadata["id"] in (build / "_ops.py").read_text("utf-8")
    files = {path for path in build.rglob("*") if path.is_file()} - {build / "metadata.json"}
    assert {str(path.relative_to(build)) for path in files} == set(metadata["digest"]["files"])
    for path in files:
        hashed = base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        assert metadata["digest"]["files"][path.relative_to(build).as_posix()] == hashed


@NEEDS_KERNELS
def test_the_library_reads_build_and_metadata(tree: Path) -> None:
    from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

    assert len(Build.open(tree).general.backends) == 4
    build = tree / "build" / "torch-cpu"
    stated = Metadata.read_from_file(build / "metadata.json").digest
    stated.validate(Digest.hash_variant(DigestAlgorithm.SHA256, build))


def test_the_card_states_the_packages_floors(tree: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    floors = dict(
        re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in project["dependencies"]
    )
    card = (tree / "CARD.md").read_text("utf-8")
    assert f"torch {floors['torch']} or newer" in card
    assert f"triton {floors['triton']} or newer" in card


def test_the_cards_example_runs(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = ModuleType("kernels")
    kernels.get_kernel = lambda repo_id, version: str_kernels
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    found: dict = {}
    card = (tree / "CARD.md").read_text("utf-8").replace("{{version}}", "0")
    exec(re.search(r"```python\n(.*?)```", card, re.S)[1], found)
    assert found["hidden"].grad is not None and found["penalty"] > 0


def test_only_an_older_tree_is_replaced(tmp_path: Path) -> None:
    write_tree(tmp_path / "hub")
    (tmp_path / "hub" / "stale").touch()
    write_tree(tmp_path / "hub")
    assert not (tmp_path / "hub" / "stale").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "work.txt").touch()
    with pytest.raises(ValueError, match="`output` must be empty or made by this command"):
        write_tree(tmp_path / "other")
    assert (tmp_path / "other" / "work.txt").exists()
