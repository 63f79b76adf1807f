"""SHA-256 of files, folders, tensors and JSON values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .atomic import write_json

MANIFEST = "manifest.json"
"""A file with the SHA-256 of every other file in its folder."""

_CHUNK = 1 << 24  # bytes of a tensor copied to the CPU at a time


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(value: Any) -> str:
    """Return the SHA-256 of a value's JSON, keys sorted, 64 hex digits; NaN is refused."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def tensor_sha256(*tensors: Tensor) -> bytes:
    """Return the SHA-256 of the concatenated bytes of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        for part in tensor_bytes(tensor):
            digest.update(part)
    return digest.digest()


def tensor_bytes(tensor: Tensor) -> Iterator[memoryview]:
    """Yield a tensor's bytes in the order of its elements, from any device, 16 MiB at a time."""
    flat = tensor.detach().reshape(-1)
    for part in flat.split(max(1, _CHUNK // tensor.element_size())):
        yield part.cpu().contiguous().view(torch.uint8).numpy().data


def write_manifest(folder: Path) -> None:
    """Write the manifest: the SHA-256 of each file in a folder, at any depth."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in files
        if path != folder / MANIFEST
    }
    write_json(folder / MANIFEST, {"sha256": sums})


def fault_of(folder: Path) -> str | None:
    """Compare a folder with its manifest; name the first file that differs, or return None."""
    try:
        sums = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        names = set(sums)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder / MANIFEST}: {error}"
    there = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path != folder / MANIFEST
    }
    for name in sorted(there | names):
        if name not in names:
            return f"{folder / name} was added"
        if name not in there or file_sha256(folder / name) != sums[name]:
            return f"{folder / name} is missing or was changed"
    return None
