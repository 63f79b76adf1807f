"""Hashes are those of the bytes, and a manifest names what is not as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from str_kernels.files import hashing
from str_kernels.files.hashing import fault_of, file_sha256, tensor_sha256, write_manifest

BYTES = bytes(range(48))


@pytest.mark.parametrize("chunk", [1, 10, 1 << 24])
@pytest.mark.parametrize(
    "tensor",
    [
        torch.frombuffer(bytearray(BYTES), dtype=torch.bfloat16).view(4, 6),
        torch.frombuffer(bytearray(BYTES), dtype=torch.float32).view(3, 4).t().contiguous().t(),
        torch.frombuffer(bytearray(BYTES), dtype=torch.int64),
    ],
    ids=["bfloat16", "not contiguous", "int64"],
)
def test_a_tensor_s_hash_is_of_its_elements_in_order(
    tensor: Tensor, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "_CHUNK", chunk)
    assert tensor_sha256(tensor) == hashlib.sha256(BYTES).digest()
    assert tensor_sha256(tensor, tensor) == hashlib.sha256(2 * BYTES).digest()


def test_an_empty_tensor_and_a_number_have_hashes() -> None:
    assert tensor_sha256(torch.empty(0, 3)) == hashlib.sha256().digest()
    assert tensor_sha256(torch.tensor(True)) == hashlib.sha256(b"\x01").digest()


def test_a_file_s_hash(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(BYTES)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(BYTES).hexdigest()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "a").write_text("b"), "a is missing or was changed"),
        (lambda folder: (folder / "deep" / "b").unlink(), "deep/b is missing or was changed"),
        (lambda folder: (folder / "deep" / "manifest.json").touch(), "manifest.json was added"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: Expecting"),
        (lambda folder: (folder / "manifest.json").write_text('{"sha256": 1}'), "manifest.json: "),
    ],
)
def test_a_manifest_names_what_differs(
    tmp_path: Path, change: Callable[[Path], object], said: str
) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a", "deep/b"):
        (tmp_path / name).write_text(name)
    write_manifest(tmp_path)
    write_manifest(tmp_path)  # of which it is no part
    assert fault_of(tmp_path) is None
    change(tmp_path)
    assert said in str(fault_of(tmp_path))
