"""Build a reference cache. A build that is killed and started again writes the same bytes."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..files import holder, locked, replacing, write_json
from .format import (
    DTYPES,
    INDEX,
    LOCK,
    PLAN,
    TIMINGS,
    CachePlan,
    ShardEntry,
    Values,
    entry_of,
    index_as_json,
    is_shard_name,
    plan_as_json,
    read_plan,
    regular_size,
    row_hash,
    shard_name,
    tensors_of,
)
from .reader import read_timings

MakeRows = Callable[[list[list[int]]], Tensor]
"""Maps rows of ids to the frozen model's values for all their tokens, (sum of lengths, K)."""

# Names of the temporary files of `replacing`; a killed run leaves one.
_TEMPORARY = re.compile(r"\.(shard-[0-9]{5,9}|index|plan|timings)-[a-z0-9_]{8}\.(safetensors|json)")


@dataclass(frozen=True)
class BuildReport:
    """The result of a build.

    Attributes:
        folder: of the cache.
        rows: number of distinct rows in it.
        duplicates: number of further rows in the data.
        tokens: number of tokens in the distinct rows.
        shards: number of shards.
        kept: number of shards that an earlier run had written.
        rebuilt: a line for each broken shard that was found.
        computed_tokens: number of tokens whose values this run computed.
        seconds: time that this took.
    """

    folder: Path
    rows: int
    duplicates: int
    tokens: int
    shards: int
    kept: int
    rebuilt: tuple[str, ...]
    computed_tokens: int
    seconds: float


def build_reference_cache(
    folder: Path | str,
    rows: Sequence[Sequence[int]],
    make: MakeRows,
    *,
    model: str,
    safety_tokens: str,
    ids: int,
    tokenizer: str | None = None,
    values: Values = "logits",
    dtype: str = "float32",
    rows_per_shard: int = 256,
    batch_tokens: int = 4096,
    made_with: Mapping[str, str] | None = None,
    overwrite: bool = False,
    on_tokens: Callable[[int, int], None] | None = None,
) -> BuildReport:
    """Compute the reference's values once for every distinct row, and store them.

    Rows are stored in the order of their first appearance, R to a shard; to compute them, the rows
    of a shard are sorted by length and batched. Shards are written under a temporary name and then
    renamed. The build resumes in the folder of an interrupted run: it keeps whole shards and
    rebuilds broken ones. The files are then byte for byte those of an uninterrupted run, except
    timings.json, which holds the time of the forward passes.

    Args:
        folder: to make or to resume in; may contain nothing but a cache.
        rows: the ids of each row, without padding.
        make: runs the frozen model: takes the rows of one batch and returns (sum of lengths, K),
            floating point, in the rows' order. Must be deterministic for each batch.
        model: fingerprint of the frozen model, 64 hex digits.
        safety_tokens: fingerprint of the safety tokens, see `SafetyTokens.fingerprint`.
        ids: K >= 1.
        tokenizer: hash of the tokenizer, or None.
        values: "logits", or "log_probs" for penalty kinds "logprob" and "coarse_kl".
        dtype: of the stored values: "float32", or "bfloat16" and "float16" for half the size and 8
            or 11 significant bits (a step of 0.125 or 0.016 at a logit of 20).
        rows_per_shard: R.
        batch_tokens: largest number of tokens in one batch, padding included; a longer row is a
            batch of its own.
        made_with: what else may change the values, as strings.
        overwrite: replace a cache that was built to another plan.
        on_tokens: called with the number of tokens done so far and of all tokens.

    Returns:
        The BuildReport.

    Raises:
        ValueError: an argument is wrong; `make` returns another shape, NaN or infinity; the folder
            holds a cache of another plan or other files; another process is building there.
        OSError: the disk is full or not writable. Files already written stay whole.

    Notes:
        Rounding may depend on the number of threads and the device, so resume on the same machine.

    Examples:
        >>> import tempfile
        >>> from str_kernels.reference_cache.reader import CachedReference
        >>> folder = tempfile.mkdtemp()
        >>> zeros = lambda rows: torch.zeros(sum(map(len, rows)), 2)
        >>> build_reference_cache(
        ...     folder, [[5, 6], [7]], zeros, model="0" * 64, safety_tokens="1" * 64, ids=2
        ... ).tokens
        3
        >>> CachedReference(folder).look_up({"input_ids": torch.tensor([[5, 6]])}).values.shape
        torch.Size([1, 2, 2])
    """
    folder = Path(folder)
    distinct = dict(zip(map(row_hash, rows), rows, strict=True))
    if not distinct or not all(len(row) for row in distinct.values()):
        raise ValueError("`rows` must be at least one row, each of at least one id; got an empty")
    plan = CachePlan(
        model=model,
        safety_tokens=safety_tokens,
        tokenizer=tokenizer,
        ids=ids,
        values=values,
        dtype=dtype,
        rows=len(distinct),
        tokens=sum(map(len, distinct.values())),
        rows_sha256=hashlib.sha256(b"".join(distinct)).hexdigest(),
        rows_per_shard=rows_per_shard,
        batch_tokens=batch_tokens,
        made_with=dict(made_with or {}),
    )
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK) as mine:
        if not mine:
            raise ValueError(
                f"`folder` must not be built by two processes at once; {holder(folder / LOCK)}"
            )
        _prepare(folder, plan, overwrite)
        build = _Build(folder, plan, make, on_tokens or (lambda done, total: None))
        return build.run(distinct, len(rows))


class _Build:
    """One run of a build, in a folder that it has locked."""

    def __init__(
        self, folder: Path, plan: CachePlan, make: MakeRows, on_tokens: Callable[[int, int], None]
    ) -> None:
        self.folder, self.plan, self.make, self.on_tokens = folder, plan, make, on_tokens
        self.done = self.computed = self.kept = 0
        self.seconds = 0.0
        self.timed = read_timings(folder)
        self.rebuilt: list[str] = []

    def run(self, distinct: dict[bytes, Sequence[int]], given: int) -> BuildReport:
        plan = self.plan
        hashes, size = list(distinct), plan.rows_per_shard
        chunks = [hashes[start : start + size] for start in range(0, len(hashes), size)]
        names = {shard_name(number) for number in range(len(chunks))}
        for path in self.folder.iterdir():
            if is_shard_name(path.name) and path.name not in names:
                path.unlink()  # more shards than the plan has
        self.on_tokens(0, plan.tokens)
        shards = [
            self.shard(number, chunk, [list(distinct[key]) for key in chunk])
            for number, chunk in enumerate(chunks)
        ]
        write_json(self.folder / INDEX, index_as_json(plan, shards))
        return BuildReport(
            folder=self.folder,
            rows=plan.rows,
            duplicates=given - plan.rows,
            tokens=plan.tokens,
            shards=len(shards),
            kept=self.kept,
            rebuilt=tuple(self.rebuilt),
            computed_tokens=self.computed,
            seconds=self.seconds,
        )

    def shard(self, number: int, hashes: list[bytes], rows: list[list[int]]) -> ShardEntry:
        path = self.folder / shard_name(number)
        tokens = sum(map(len, rows))
        if os.path.lexists(path):
            try:
                entry = self.read(path, hashes, rows)
            except (ValueError, KeyError, OSError, SafetensorError) as error:
                self.rebuilt.append(f"{path.name}: {error}")
            else:
                self.kept += 1
                self.done += tokens
                self.on_tokens(self.done, self.plan.tokens)
                return entry
        tensors = tensors_of(self.compute(rows), [len(row) for row in rows], hashes)
        data = save(tensors)
        with replacing(path) as temporary:
            temporary.write_bytes(data)
        total_tokens, total_seconds = self.timed
        content = {"tokens": total_tokens + self.computed, "seconds": total_seconds + self.seconds}
        write_json(self.folder / TIMINGS, content)
        return entry_of(path.name, data, tensors)

    def read(self, path: Path, hashes: list[bytes], rows: list[list[int]]) -> ShardEntry:
        """Read an existing shard; raise unless it is what this run would write, byte for byte."""
        regular_size(path)  # a link is no shard
        data = path.read_bytes()
        logits = load(data)["safety_logits"]
        shape = (sum(map(len, rows)), self.plan.ids)
        if logits.shape != shape or logits.dtype != DTYPES[self.plan.dtype]:
            raise ValueError(f"it holds {tuple(logits.shape)} {logits.dtype}")
        # compute offsets, hashes and checksums again from these rows and values
        expected = tensors_of(logits, [len(row) for row in rows], hashes)
        if save(expected) != data:
            raise ValueError("its bytes are not those that were written")
        return entry_of(path.name, data, expected)

    def compute(self, rows: list[list[int]]) -> Tensor:  # (tokens, K)
        """Compute the values of a shard, its rows sorted by length and batched."""
        made: list[Tensor] = [torch.zeros(0)] * len(rows)
        for batch in batches_of([len(row) for row in rows], self.plan.batch_tokens):
            chosen = [rows[index] for index in batch]
            lengths = [len(row) for row in chosen]
            start = time.perf_counter()
            values = self.make(chosen)
            self.check(values, sum(lengths))
            stored = values.detach().cpu().to(DTYPES[self.plan.dtype])
            self.seconds += time.perf_counter() - start
            if not bool(torch.isfinite(stored).all()):
                raise ValueError(
                    f"`make` must return numbers that {self.plan.dtype} can hold; got NaN or "
                    "infinity"
                )
            for index, part in zip(batch, stored.split(lengths), strict=True):
                made[index] = part
            self.computed += sum(lengths)
            self.done += sum(lengths)
            self.on_tokens(self.done, self.plan.tokens)
        return torch.cat(made)

    def check(self, values: object, tokens: int) -> None:
        if not isinstance(values, Tensor) or not values.is_floating_point():
            raise TypeError(f"`make` must return a floating-point tensor; got {type(values)}")
        if tuple(values.shape) != (tokens, self.plan.ids):
            raise ValueError(
                f"`make` must return ({tokens}, {self.plan.ids}), a row for each token; got "
                f"{tuple(values.shape)}"
            )


def batches_of(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group rows of similar length into batches whose padded size is at most `batch_tokens`.

    Args:
        lengths: tokens of each row.
        batch_tokens: limit of longest row times number of rows; a longer row is a batch of its own.

    Returns:
        The indices of the rows in each batch, shortest first.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):  # stable
        # the row is the longest so far
        if batches and (len(batches[-1]) + 1) * lengths[index] <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _prepare(folder: Path, plan: CachePlan, overwrite: bool) -> None:
    """Write the plan, and remove all else but shards that may belong to it."""
    ours = {INDEX, PLAN, TIMINGS, LOCK}
    names = sorted(path.name for path in folder.iterdir())
    foreign = [
        name
        for name in names
        if name not in ours and not is_shard_name(name) and not _TEMPORARY.fullmatch(name)
    ]
    if foreign:
        raise ValueError(f"`folder` must hold nothing but a cache; got {folder} with {foreign[0]}")
    for name in names:
        if _TEMPORARY.fullmatch(name):
            (folder / name).unlink()
    reason = _reason_to_refuse(folder, plan)
    if reason is not None:
        if not overwrite:
            raise ValueError(
                f"`folder` must be new, or hold a cache of the same plan, unless overwrite is set; "
                f"{folder} {reason}"
            )
        # the plan last, so that a run killed here leaves a folder that is refused again
        for name in (INDEX, TIMINGS, *filter(is_shard_name, names), PLAN):
            (folder / name).unlink(missing_ok=True)
    if not os.path.lexists(folder / PLAN):
        write_json(folder / PLAN, plan_as_json(plan))


def _reason_to_refuse(folder: Path, plan: CachePlan) -> str | None:
    if not os.path.lexists(folder / PLAN):
        made = [path.name for path in folder.iterdir() if path.name not in (LOCK, TIMINGS)]
        return f"holds {min(made)} and no {PLAN}" if made else None
    try:
        there = read_plan(folder)
    except ValueError as error:
        return f"holds a plan that cannot be read: {error}"
    return None if there == plan else f"was built with {there.differences(plan)}"
