"""The file format of a reference cache, and the checks before its contents are used.

A cache is a folder with index.json and shards. Nothing in it is trusted: file names must be the
expected ones, sizes are checked before a file is mapped, tables when it is opened, and each row
when it is read.

The shards are safetensors files. An array store such as zarr would be one more dependency, and
could not check that a row belongs to this model, these ids and this text.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import file_sha256, tensor_sha256

SCHEMA_VERSION = 1
INDEX, PLAN, TIMINGS, LOCK = "index.json", "plan.json", "timings.json", "build.lock"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Values = Literal["logits", "log_probs"]

_LOGITS, _OFFSETS, _HASH, _CHECK = "safety_logits", "offsets", "row_hash", "row_check"
_SHARD_NAME = re.compile(r"shard-[0-9]{5,9}\.safetensors")
_HEX = re.compile(r"[0-9a-f]{64}")
_LARGEST_HEADER = 4096  # bytes; a header for four tensors takes about 300
_LARGEST_JSON = 1 << 28  # bytes; an index takes about 300 for each shard
_DAMAGED = "restore it, or run `str-kernels cache build` again, which rebuilds what is broken"


@dataclass(frozen=True)
class CachePlan:
    """Everything that determines what a cache holds, byte for byte.

    Attributes:
        model: fingerprint of the frozen model, 64 hex digits.
        safety_tokens: fingerprint of the safety tokens, see `SafetyTokens.fingerprint`.
        tokenizer: hash of the tokenizer, or None if it is not known.
        ids: K.
        values: "logits", or "log_probs" for penalty kinds "logprob" and "coarse_kl".
        dtype: of the stored values.
        rows: number of distinct rows.
        tokens: their number in all rows.
        rows_sha256: SHA-256 of the rows' hashes, in order.
        rows_per_shard: R.
        batch_tokens: tokens of one forward, padding included; it determines each row's padding.
        made_with: what else may change a value: versions, path, backend, dtype, device.
    """

    model: str
    safety_tokens: str
    tokenizer: str | None
    ids: int
    values: Values
    dtype: str
    rows: int
    tokens: int
    rows_sha256: str
    rows_per_shard: int
    batch_tokens: int
    made_with: dict[str, str]

    def __post_init__(self) -> None:
        for name in ("model", "safety_tokens", "rows_sha256"):
            _check_hex(name, getattr(self, name))
        if self.tokenizer is not None:
            _check_hex("tokenizer", self.tokenizer)
        for name in ("ids", "rows", "tokens", "rows_per_shard", "batch_tokens"):
            _check_count(name, getattr(self, name))
        for name, choices in (("values", get_args(Values)), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(choices)}; got {getattr(self, name)!r}"
                )
        if not isinstance(self.made_with, dict) or not all(
            isinstance(text, str) for item in self.made_with.items() for text in item
        ):
            raise ValueError(f"`made_with` must hold texts; got {self.made_with!r}")

    def differences(self, other: CachePlan) -> str:
        """Describe the fields that differ from another plan's."""
        mine, others = asdict(self), asdict(other)
        found = [
            f"{name} {_short(mine[name])} instead of {_short(others[name])}"
            for name in mine
            if mine[name] != others[name]
        ]
        return "; ".join(found)


@dataclass(frozen=True)
class ShardEntry:
    """The entry of one shard in the index."""

    file: str
    rows: int
    tokens: int
    bytes: int
    sha256: str
    tables_sha256: str

    def __post_init__(self) -> None:
        if not isinstance(self.file, str) or not _SHARD_NAME.fullmatch(self.file):
            raise ValueError(f"`file` must be a shard's plain name; got {self.file!r}")
        for name in ("rows", "tokens", "bytes"):
            _check_count(name, getattr(self, name))
        for name in ("sha256", "tables_sha256"):
            _check_hex(name, getattr(self, name))


def shard_name(number: int) -> str:
    """Return the file name of a shard, counted from 0."""
    return f"shard-{number:05d}.safetensors"


def is_shard_name(name: str) -> bool:
    """Return whether a file name is that of a shard."""
    return _SHARD_NAME.fullmatch(name) is not None


def row_hash(ids: Sequence[int] | np.ndarray[Any, Any]) -> bytes:
    """Return the SHA-256 of a row's ids without padding, as little-endian int64."""
    return hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).digest()


def tensors_of(
    logits: Tensor,  # (tokens, K)
    lengths: Sequence[int],  # R
    hashes: Sequence[bytes],  # R
) -> dict[str, Tensor]:
    """Return the tensors of one shard."""
    offsets = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    checks = [tensor_sha256(row) for row in logits.split(list(lengths))]
    return {
        _LOGITS: logits,
        _OFFSETS: offsets,
        _HASH: _as_table(hashes),
        _CHECK: _as_table(checks),
    }


def entry_of(file: str, data: bytes, tensors: Mapping[str, Tensor]) -> ShardEntry:
    """Return a shard's index entry, from the data that was to be written."""
    offsets, hashes, checks = (tensors[name] for name in (_OFFSETS, _HASH, _CHECK))
    return ShardEntry(
        file=file,
        rows=hashes.shape[0],
        tokens=tensors[_LOGITS].shape[0],
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        tables_sha256=tensor_sha256(offsets, hashes, checks).hex(),
    )


class Shard:
    """An open shard: its tables are in memory, its logits memory-mapped.

    Raises:
        ValueError: the file is missing, has another size, or its tables are damaged.
    """

    def __init__(self, folder: Path, entry: ShardEntry, plan: CachePlan) -> None:
        self.path, self.entry = folder / entry.file, entry
        self._dtype = DTYPES[plan.dtype]
        self._check_size()
        try:
            opened: Any = safe_open(self.path, "pt")
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
            expected = {
                _LOGITS: (entry.tokens, plan.ids),
                _OFFSETS: (entry.rows + 1,),
                _HASH: (entry.rows, 32),
                _CHECK: (entry.rows, 32),
            }
            if shapes != expected:
                raise ValueError(f"it holds {shapes} where the index says {expected}")
            self.offsets = opened.get_tensor(_OFFSETS).clone()
            self.hashes = opened.get_tensor(_HASH).clone()
            self.checks = opened.get_tensor(_CHECK).clone()
            self._logits = opened.get_slice(_LOGITS)
        except (SafetensorError, OSError, ValueError, OverflowError) as error:
            raise self._damaged(str(error)) from error
        tables = tensor_sha256(self.offsets, self.hashes, self.checks).hex()
        if tables != entry.tables_sha256:
            raise self._damaged("its tables are not those that were written")
        steps = self.offsets.diff()
        if int(self.offsets[0]) or int(self.offsets[-1]) != entry.tokens or int(steps.min()) < 1:
            raise self._damaged("its offsets do not cover its tokens")

    def row(self, number: int) -> Tensor:  # (T, K)
        """Return a row's values in the cache's dtype, after checking their checksum.

        Raises:
            ValueError: the file has been truncated or changed.
        """
        self._check_size()  # reading past the end of a mapped file would kill the process
        start, stop = int(self.offsets[number]), int(self.offsets[number + 1])
        try:
            values: Tensor = self._logits[start:stop].clone()
        except SafetensorError as error:
            raise self._damaged(str(error)) from error
        # check the copy, since the mapped file may change after the check
        if (
            values.dtype != self._dtype
            or tensor_sha256(values) != self.checks[number].numpy().tobytes()
        ):
            raise self._damaged(f"row {number} of it is not what was written")
        return values

    def verify(self) -> None:
        """Read and check the whole file.

        Raises:
            ValueError: something differs from what was written.
        """
        for number in range(self.entry.rows):
            self.row(number)
        if file_sha256(self.path) != self.entry.sha256:
            raise self._damaged("its bytes are not those that were written")

    def _check_size(self) -> None:
        size = regular_size(self.path)
        if size != self.entry.bytes:
            raise self._damaged(f"it has {size} bytes, the index says {self.entry.bytes}")

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(f"`folder` must hold whole shards; {self.path}: {reason}; {_DAMAGED}")


def regular_size(path: Path) -> int:
    """Return the size of a plain file, bytes; ValueError for a link, a folder or nothing."""
    try:
        found = os.lstat(path)
    except OSError as error:
        raise ValueError(
            f"`folder` must hold {path.name}; {path}: {error.strerror}; {_DAMAGED}"
        ) from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"`folder` must hold plain files; {path} is none (a link or a folder)")
    return found.st_size


def plan_as_json(plan: CachePlan) -> dict[str, Any]:
    """Return the content of plan.json."""
    return _sealed(asdict(plan))


def index_as_json(plan: CachePlan, shards: Sequence[ShardEntry]) -> dict[str, Any]:
    """Return the content of index.json."""
    return _sealed({**asdict(plan), "shards": [asdict(shard) for shard in shards]})


def read_plan(folder: Path) -> CachePlan:
    """Read plan.json; ValueError if it is damaged."""
    path = folder / PLAN
    content = _read_sealed(path)
    try:
        plan: CachePlan = _made(CachePlan, content)
    except (TypeError, ValueError) as error:
        raise _bad_json(path, error) from error
    return plan


def read_index(folder: Path) -> tuple[CachePlan, list[ShardEntry]]:
    """Read index.json and check every field.

    Raises:
        ValueError: it is missing (the cache was not finished), damaged, or has an invalid field.
    """
    path = folder / INDEX
    if not os.path.lexists(path):
        what = "is not finished: build it again, it goes on where it stopped"
        if not os.path.lexists(folder / PLAN):
            what = "is not one: `str-kernels cache build` makes it"
        raise ValueError(f"`folder` must be a reference cache; {folder} {what}")
    content = _read_sealed(path)
    try:
        listed = content.pop("shards", None)
        plan = _made(CachePlan, content)
        if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
            raise ValueError("`shards` must be a list of objects")
        shards = [_made(ShardEntry, item) for item in listed]
        _check_shards(plan, shards)
    except (TypeError, ValueError) as error:
        raise _bad_json(path, error) from error
    return plan, shards


def _check_shards(plan: CachePlan, shards: Sequence[ShardEntry]) -> None:
    for number, shard in enumerate(shards):
        if shard.file != shard_name(number):
            raise ValueError(f"shard {number} must be {shard_name(number)}; got {shard.file}")
        full = number < len(shards) - 1
        if shard.rows > plan.rows_per_shard or (full and shard.rows < plan.rows_per_shard):
            raise ValueError(f"{shard.file} must have {plan.rows_per_shard} rows; got {shard.rows}")
        width = plan.ids * DTYPES[plan.dtype].itemsize
        data = shard.tokens * width + 8 * (shard.rows + 1) + 64 * shard.rows
        if not data < shard.bytes <= data + _LARGEST_HEADER:
            raise ValueError(f"{shard.file} must have some {data} bytes; got {shard.bytes}")
    for name in ("rows", "tokens"):
        total = sum(getattr(shard, name) for shard in shards)
        if total != getattr(plan, name):
            raise ValueError(f"`{name}` must be {total}, the sum of the shards'")


def _sealed(content: dict[str, Any]) -> dict[str, Any]:
    content = {"schema_version": SCHEMA_VERSION, **content}
    return {**content, "checksum": _checksum(content)}


def _checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_sealed(path: Path) -> dict[str, Any]:
    """Read a JSON object, check its checksum and remove it."""
    if regular_size(path) > _LARGEST_JSON:
        raise _bad_json(path, ValueError("it is too large"))
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no object")
        version = content.get("schema_version")
        if version != SCHEMA_VERSION or isinstance(version, bool):
            raise ValueError(f"schema_version is {version!r}, this release reads {SCHEMA_VERSION}")
        if content.pop("checksum", None) != _checksum(content):
            raise ValueError("its checksum is another")
    except (ValueError, RecursionError) as error:
        raise _bad_json(path, error) from error
    del content["schema_version"]
    return content


def _made(kind: Any, content: Mapping[str, Any]) -> Any:
    """Make a dataclass from a mapping that must have exactly its fields."""
    names = {field.name for field in fields(kind)}
    if set(content) != names:
        raise ValueError(f"its fields must be {sorted(names)}; got {sorted(content)}")
    return kind(**content)


def _bad_json(path: Path, error: BaseException) -> ValueError:
    return ValueError(f"`folder` must be a reference cache; {path} is damaged: {error}; {_DAMAGED}")


def _check_hex(name: str, value: object) -> None:
    if not isinstance(value, str) or not _HEX.fullmatch(value):
        raise ValueError(f"`{name}` must be 64 hex digits; got {str(value)[:80]!r}")


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**48:
        raise ValueError(f"`{name}` must be an integer in [1, 2^48); got {str(value)[:80]}")


def _as_table(digests: Sequence[bytes]) -> Tensor:  # (R, 32)
    joined = np.frombuffer(b"".join(digests), dtype=np.uint8)
    return torch.from_numpy(joined.copy()).view(-1, 32)


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}..." if _HEX.fullmatch(text) else text
