"""The files of a model, and what may be wrong with them: cut short, or Git LFS pointers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open

_POINTER = b"version https://git-lfs.github.com/spec/"
_TEXTS = (".json", ".jinja", ".model", ".txt")
_SHOWN = 3  # number of names in a message


def file_of(source: str, name: str) -> Path | None:
    """Return the local path of a file of a folder or hub id.

    Args:
        source: a folder or a hub id.
        name: the file's name.

    Returns:
        The path, or None if there is no such file.
    """
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(source, name))
    except (OSError, ValueError):  # no such model: reported when its weights are loaded
        return None


def check_texts(name: str, folder: Path) -> None:
    """Refuse Git LFS pointers, which would be read as a chat template, or ignored.

    Args:
        name: the model's name as the user gave it.
        folder: the model's folder; it need not exist.

    Raises:
        ValueError: there is such a file; the message names the first.
    """
    for path in _files_of(folder):
        if path.suffix in _TEXTS and _is_pointer(path):
            raise ValueError(f"`model` must be a whole folder; got {name!r}: {_pointer_text(path)}")


def reason_of(error: Exception, folder: Path) -> str:
    """Say in one line why a folder could not be read.

    Args:
        error: the exception.
        folder: the folder that was read; it need not exist.

    Returns:
        The name of a broken file, which the libraries' messages omit; else the error's message.
    """
    for path in _files_of(folder):
        if path.suffix in (*_TEXTS, ".safetensors") and _is_pointer(path):
            return _pointer_text(path)
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt"):
                    pass
            except (SafetensorError, OSError) as fault:
                return f"{path} is damaged or cut short ({fault})"
    said = " ".join(str(error).split())
    plain = said and type(error) in (OSError, ValueError, Exception)
    return said if plain else f"{type(error).__name__}: {said}"


def first_names(names: Iterable[str]) -> str:
    """Return the first few names as text, and how many more there are."""
    ordered = sorted(names)
    more = len(ordered) - _SHOWN
    return ", ".join(ordered[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _pointer_text(path: Path) -> str:
    return f"{path} is a pointer of Git LFS and not the file itself; run git lfs pull there"
