"""Atomic writes: files and folders are written under a temporary name, flushed, then renamed.

A command that makes a folder checks the path before it starts work, and marks the folder with its
kind when it writes it:

    check_output(output, overwrite, marker="run", inputs=[data])
    ...
    with replacing_folder(output, marker="run") as folder:
        ...

The marker is a file in the folder. Only an empty folder, or one with a marker of the same kind, is
ever replaced. Libraries for atomic writes are of no use here: they replace single files.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MARKER = ".str-kernels.json"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` unless the block raises.

    A full disk or a killed process leaves the old file as it was.

    Args:
        path: the file to make or replace. Its folder must exist.

    Yields:
        A path in the same folder and with the same suffix, to write to.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp's 0600 would hide the file from the group
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_output(
    path: Path, overwrite: bool = False, *, marker: str, inputs: Iterable[Path] = ()
) -> None:
    """Check, before any work is done, that a folder can be made and may be replaced.

    Args:
        path: the folder to make.
        overwrite: an existing folder may be replaced, if it is empty or has this marker.
        marker: the kind of folder, as in `replacing_folder`.
        inputs: files that the command reads, which replacing the folder must not delete.

    Raises:
        ValueError: the message names `output` and says why. Nothing has been written.
    """
    rule = f"`output` must be a folder that can be made; got {path}"
    try:
        place = path.resolve()
        for name, kept in (("the working directory", Path.cwd()), ("the home folder", Path.home())):
            if kept.resolve().is_relative_to(place):
                raise ValueError(f"`output` must not be {name} or a folder above it; got {path}")
        if place.exists():
            _check_replaced(place, path, overwrite, marker)
        for given in inputs:
            if given.resolve() != place and given.resolve().is_relative_to(place):
                raise ValueError(
                    f"`output` must not hold what is read; got {path}, in which {given} lies"
                )
        there = next(folder for folder in place.parents if folder.exists())
        if not there.is_dir():
            raise ValueError(f"{rule}: {there} is a file")
        for part in place.relative_to(there).parts:
            Path(tempfile.mkdtemp(dir=there, prefix=_prefix(part))).rmdir()
    except (OSError, RuntimeError) as error:  # a loop of links is either, from Python to Python
        raise ValueError(f"{rule}: {error}") from error


def _check_replaced(place: Path, path: Path, overwrite: bool, marker: str) -> None:
    """Raise ValueError unless `place` is an empty folder or one of this kind."""
    if not place.is_dir():
        raise ValueError(f"`output` must be a folder to make; got the file {path}")
    if not overwrite:
        raise ValueError(f"`output` must not exist unless overwrite is set; got {path}")
    if place.is_mount():
        raise ValueError(f"`output` must not be a mount point; got {path}. Name a folder in it")
    found = _read_marker(place)
    if found != marker and any(place.iterdir()):
        what = "no such file" if found is None else f"one of kind {found!r}"
        raise ValueError(
            f"`output` must be empty or made by this command to be replaced, which the file "
            f"{MARKER} of kind {marker!r} in it would say; got {path} with {what}"
        )


def _read_marker(folder: Path) -> str | None:
    """Return the kind of a folder that this program made, or None for any other."""
    try:
        kind = json.loads((folder / MARKER).read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(kind)


def _prefix(name: str) -> str:
    return f".{name}-"


@contextlib.contextmanager
def replacing_folder(path: Path, *, marker: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it to `path` unless the block raises.

    An existing folder is removed only after the new one is complete. (Not every system can exchange
    two folders in one step: a kill between the two renames leaves the old one, whole, beside
    `path` under a name that starts with a dot.)

    Args:
        path: the folder to make or replace; its parents are made. A link is followed.
        marker: the kind of folder, stored in it with the version for `check_output`.

    Yields:
        An empty folder to write to.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path.name)))
    try:
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        yield new
        if marker is not None:
            mark_folder(new, marker)
        _exchange(new, path, old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def mark_folder(folder: Path, marker: str) -> None:
    """Write the marker of a folder's kind, for `check_output`."""
    write_json(folder / MARKER, {"kind": marker, "version": _version()})


def move_folder(folder: Path, path: Path) -> None:
    """Rename a complete folder to `path`, on the same disk, replacing an existing one."""
    path = path.resolve()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_prefix(path.name)) as temporary:
        _exchange(folder, path, Path(temporary) / "old")


def _exchange(new: Path, path: Path, old: Path) -> None:
    readable = 0o666 & ~_umask()
    for file in new.rglob("*"):  # safetensors makes its files readable for their owner only
        if file.is_file() and not file.is_symlink():
            file.chmod(file.stat().st_mode | readable)
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise


def _version() -> str | None:
    try:
        return version("str-kernels")
    except PackageNotFoundError:  # run from a copy of the source
        return None


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
