"""CachedReference: the reference's safety logits, read from a folder instead of computed."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..tokens import SafetyTokens
from .format import INDEX, PLAN, TIMINGS, Shard, read_index, read_plan, row_hash

KEY = "ref_safety_logits"
SHIFTED, PACKED = "shifted", "packed"
# The name includes the layout, so that a forward knows it without waiting for the device.
KEYS = {
    frozenset(layouts): "_".join([KEY, *layouts])
    for layouts in ((), (SHIFTED,), (PACKED,), (SHIFTED, PACKED))
}

_ROW = ("input_ids", "attention_mask", "position_ids")
# Inputs of a batch on which the logits do not depend, given its ids. Anything else (images,
# embeddings, token types) would have to be in the cache's key.
_HARMLESS = (
    *_ROW, "labels", "shift_labels", "num_items_in_batch", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "output_router_logits", "logits_to_keep",
    "cache_position", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
)  # fmt: skip
DATED = "rows with the day"  # in `made_with`: the chat template writes the date into the rows
OF_A_DAY = (
    "a cache is good for that day, unless the same `chat_template_kwargs` name one, as "
    '{"date_string": ...} of Llama 3\'s template does for anchors'
)
_SHOWN = 8  # ids of a missing row that an error shows


class LookUp(NamedTuple):
    """The cached values of a batch.

    Attributes:
        values: (B, T, K) float32 on the CPU, NaN at padding.
        layouts: how the rows differ from those that the cache was built from: "shifted" (the first
            position is not 0, as with left padding), "packed" (several rows in one).
    """

    values: Tensor
    layouts: frozenset[str]


class CachedReference:
    """The reference's safety logits for a tokenised data set, read from a folder.

    Build it with `str-kernels cache build`, and pass it to `attach(model, tokens, reference=...)`.
    A row is found by its ids, whatever the order, size and padding of the batch; packed rows are
    split where `position_ids` start again at 0 and looked up one by one. The reference's forward is
    never run, so it needs no adapters to switch off, second model or frozen base: even a model
    whose every weight is trained has a reference.

    Args:
        folder: of the cache.
        check_model: let `attach` compare the model's base weights with those that the cache was
            made from. Use False to resume a full fine-tuning, whose weights have changed.

    Raises:
        ValueError: the folder is not a whole cache; the message names the file and the fault.

    Notes:
        Sizes, names and tables are checked when the cache is opened, and each row's values by their
        SHA-256 at every look-up, so that later corruption is found too. A file that is truncated
        between the check of its size and the copy ends the process (SIGBUS).
        The values are those of each row by itself, in the cache's dtype: bfloat16 has a step of
        0.125 at a logit of 20. A 16-bit model rounds a little differently in each batch, so the
        drift in the first step is small, but not exactly 0.
        A label on the first token after left padding makes the loss NaN: it is predicted at a
        padding position, which has no cached values. Prompts have no labels there anyway.
        On a GPU, a look-up in the forward waits for the device, because it reads the ids;
        `with_collator` looks them up in the data loader instead.

    Examples:
        >>> reference = CachedReference("cache")  # doctest: +SKIP
        >>> handle = attach(model, tokens, reference=reference)  # doctest: +SKIP
    """

    def __init__(self, folder: Path | str, check_model: bool = True) -> None:
        self.folder = Path(folder)
        self.check_model = check_model
        self.plan, entries = read_index(self.folder)
        self._shards = [Shard(self.folder, entry, self.plan) for entry in entries]
        self._where: dict[bytes, tuple[Shard, int]] = {}
        for shard in self._shards:
            for number, key in enumerate(shard.hashes.numpy()):
                self._where[key.tobytes()] = (shard, number)
        if len(self._where) != self.plan.rows:
            raise ValueError(f"`folder` must hold distinct rows; some are twice in {self.folder}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy by folder, so that a data loader's worker opens it again."""
        return type(self), (self.folder, self.check_model)

    def __repr__(self) -> str:
        """Show the folder and the size of the cache."""
        plan = self.plan
        return (
            f"CachedReference({str(self.folder)!r}): {plan.rows} rows of {plan.ids} {plan.values}"
        )

    def check_tokens(self, safety_tokens: SafetyTokens) -> None:
        """Raise ValueError unless the cache was made for these tokens."""
        there, here = self.plan.tokenizer, safety_tokens.tokenizer_hash
        if there != here:
            raise ValueError(
                "`safety_tokens` must be of the tokenizer that the cache was made with, "
                f"{there or 'none named'}; got tokens of {here or 'none named'}"
            )
        if len(safety_tokens) != self.plan.ids or (
            safety_tokens.fingerprint != self.plan.safety_tokens
        ):
            raise ValueError(
                f"`safety_tokens` must be the {self.plan.ids} ids, in their order, that the cache "
                f"in {self.folder} was made for; got {len(safety_tokens)} others"
            )

    def check_values(self, log_probs: bool) -> None:
        """Raise ValueError unless the cache holds the values that the penalty compares."""
        if log_probs != (self.plan.values == "log_probs"):
            wanted = "log_probs" if log_probs else "logits"
            raise ValueError(
                f"`penalty` must be of a kind that compares {self.plan.values}, which is what "
                f"{self.folder} holds; got one that compares {wanted}: build a cache with --kind"
            )

    def check_fingerprint(self, fingerprint: str) -> None:
        """Raise ValueError unless the cache was made from the model with this fingerprint."""
        if self.check_model and fingerprint != self.plan.model:
            made = ", ".join(f"{name} {text}" for name, text in self.plan.made_with.items())
            raise ValueError(
                f"`model` must have the base weights that the cache in {self.folder} was made from "
                f"({self.plan.model[:12]}; {made}); got {fingerprint[:12]}. Build it again from "
                "this model; CachedReference(folder, check_model=False) is for a full fine-tuning "
                "that is resumed"
            )

    def __call__(self, ids: Tensor, batch: Mapping[str, Any]) -> Tensor:  # (B, T, K)
        """Return a batch's values, as any function that `attach` takes as `reference`.

        Args:
            ids: (K,) the safety ids.
            batch: input_ids (B, T) and, if present, attention_mask and position_ids.

        Returns:
            (B, T, K) float32 on the device of `ids`.

        Raises:
            ValueError: a row is not in the cache, or its layout needs a check of the model, which
                only `attach` can make.
        """
        if ids.shape != (self.plan.ids,):
            raise ValueError(f"`ids` must have shape ({self.plan.ids},); got {tuple(ids.shape)}")
        found = self.look_up(batch)
        if found.layouts:
            raise ValueError(
                f"`batch` must hold plain rows, padded on the right; got {', '.join(found.layouts)}"
            )
        return found.values.to(ids.device)

    def look_up(self, batch: Mapping[str, Any]) -> LookUp:
        """Find every row of a batch.

        Args:
            batch: input_ids (B, T) on any device; attention_mask (B, T) of 0 and 1, whose ones
                are consecutive in each row; position_ids (B, T) or (1, T), which count up and
                start again at 0. No other inputs that the logits depend on.

        Returns:
            The values and the layouts found.

        Raises:
            ValueError: a row is not in the cache (it was cut, joined or never there), the batch has
                other inputs, or a file is damaged. A missing row is named by its number and first
                ids.
        """
        check_batch(batch)
        ids = _on_cpu(batch, "input_ids")
        values = torch.full((*ids.shape, self.plan.ids), torch.nan, dtype=torch.float32)
        layouts: set[str] = set()
        for row, start, stop, layout in _segments(ids, batch):
            layouts |= layout
            values[row, start:stop] = self._row(ids[row, start:stop], row)
        return LookUp(values, frozenset(layouts))

    def _row(self, ids: np.ndarray[Any, Any], row: int) -> Tensor:  # (T, K)
        found = self._where.get(row_hash(ids))
        if found is None:
            shown = ", ".join(map(str, ids[:_SHOWN].tolist()))
            day = self.plan.made_with.get(DATED)
            dated = f". The chat template wrote the day into them, {day}: {OF_A_DAY}" if day else ""
            raise ValueError(
                f"`batch` must hold rows of the cache in {self.folder}, whole and not joined; row "
                f"{row} of the batch is not there: {len(ids)} tokens, {shown}"
                f"{', ...' if len(ids) > _SHOWN else ''}. Build the cache from the same file with "
                f"the same max_length{dated}"
            )
        shard, number = found
        return shard.row(number)

    def with_collator(self, collator: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return a collator that also looks up the values, in the data loader and on the CPU.

        The attached model takes them from its batch, so its forward does not wait for the device.

        Args:
            collator: makes a batch with input_ids from rows.
        """
        return _Collator(self, collator)

    def measure_look_up(self, tokens: int = 1000) -> tuple[int, float]:
        """Look up at least `tokens` tokens, or all; return their number and the seconds."""
        done, start = 0, time.perf_counter()
        for shard, number in self._where.values():
            done += shard.row(number).shape[0]
            if done >= tokens:
                break
        return done, time.perf_counter() - start


class _Collator:
    """A class and not a closure, so that it can be pickled for the workers of a data loader."""

    def __init__(self, cached: CachedReference, collator: Callable[[Any], Any]) -> None:
        self.cached, self.collator = cached, collator

    def __call__(self, rows: Any) -> Any:
        batch = self.collator(rows)
        found = self.cached.look_up(batch)
        batch[KEYS[found.layouts]] = found.values
        return batch


def take_from(batch: dict[str, Any]) -> LookUp | None:
    """Remove from a batch the values that `with_collator` added, and return them; None without."""
    found = None
    for layouts, key in KEYS.items():
        values = batch.pop(key, None)
        if values is not None:
            found = LookUp(values, layouts)
    return found


def check_batch(batch: Mapping[str, Any]) -> None:
    """Raise ValueError for a batch whose logits depend on more than its ids."""
    if not isinstance(batch.get("input_ids"), Tensor) or batch["input_ids"].dim() != 2:
        raise ValueError("`input_ids` must be (B, T) to be looked up in a reference cache")
    for name, value in batch.items():
        if name not in _HARMLESS and value is not None:
            raise ValueError(
                f"`reference` must not be a cache where the logits depend on `{name}`: a row is "
                "found by its input_ids alone"
            )
    if batch.get("cu_seq_lens_q") is not None and batch.get("position_ids") is None:
        raise ValueError("`position_ids` must be given with `cu_seq_lens_q` for a reference cache")


def verify_cache(
    folder: Path | str, on_shard: Callable[[int, int], None] | None = None
) -> list[str]:
    """Read a whole cache and compare it with its checksums.

    Args:
        folder: of the cache.
        on_shard: called with the number of shards read so far and of all shards.

    Returns:
        One line for each fault; empty for a whole cache.
    """
    folder = Path(folder)
    try:
        plan, entries = read_index(folder)
    except ValueError as error:
        return [str(error)]
    broken = []
    for done, entry in enumerate(entries, start=1):
        try:
            Shard(folder, entry, plan).verify()
        except ValueError as error:
            broken.append(str(error))
        if on_shard is not None:
            on_shard(done, len(entries))
    try:
        if read_plan(folder) != plan:
            broken.append(f"{folder / PLAN} is another cache's than {INDEX}")
        if not broken:
            CachedReference(folder)  # checks that no row is there twice
    except ValueError as error:
        broken.append(str(error))
    return broken


def read_timings(folder: Path | str) -> tuple[int, float]:
    """Return the number of tokens whose forward was timed during the build, and the seconds.

    The timings are informative only, so an unreadable file counts as an empty one.
    """
    try:
        content = json.loads((Path(folder) / TIMINGS).read_text(encoding="utf-8"))
        tokens, seconds = int(content["tokens"]), float(content["seconds"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 0, 0.0
    return (tokens, seconds) if tokens > 0 and 0 < seconds < float("inf") else (0, 0.0)


def _segments(
    ids: np.ndarray[Any, Any], batch: Mapping[str, Any]
) -> Iterator[tuple[int, int, int, set[str]]]:
    """Yield the segments of each row: row, first column, column after the last, layouts."""
    mask, positions = _on_cpu(batch, "attention_mask"), _on_cpu(batch, "position_ids")
    if mask is not None and (mask.shape != ids.shape or not np.isin(mask, (0, 1)).all()):
        raise ValueError(
            f"`attention_mask` must be {ids.shape} of 0 and 1 for a reference cache; got "
            f"{mask.shape} {mask.dtype}"
        )
    if positions is not None:
        if positions.ndim != 2 or positions.shape[1] != ids.shape[1]:
            raise ValueError(
                f"`position_ids` must be {ids.shape} for a reference cache; got {positions.shape}"
            )
        positions = np.broadcast_to(positions, ids.shape)
    for row in range(ids.shape[0]):
        columns = np.arange(ids.shape[1]) if mask is None else np.flatnonzero(mask[row])
        if not len(columns):
            continue
        first, last = int(columns[0]), int(columns[-1])
        if last - first + 1 != len(columns):
            raise ValueError(f"`attention_mask` must have one run of ones in a row; got row {row}")
        counted = columns if positions is None else positions[row, columns]
        breaks = np.flatnonzero(np.diff(counted) != 1) + 1
        if counted[breaks].any():
            raise ValueError(
                f"`position_ids` must count up by 1 and start again at 0; they do not in row {row}"
            )
        layout = {SHIFTED} if counted[0] else set()
        if len(breaks):
            layout.add(PACKED)
        edges = [first, *(first + int(at) for at in breaks), last + 1]
        for start, stop in itertools.pairwise(edges):
            yield row, start, stop, layout


def _on_cpu(batch: Mapping[str, Any], name: str) -> Any:
    value = batch.get(name)
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise ValueError(f"`{name}` must be a tensor; got {type(value).__name__}")
    return value.detach().cpu().numpy()
