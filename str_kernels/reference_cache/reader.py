"""CachedReference: the frozen model's safety logits, read from a folder instead of computed."""

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
# The layout is part of the name: in a forward it is then known without waiting for the device.
KEYS = {
    frozenset(layouts): "_".join([KEY, *layouts])
    for layouts in ((), (SHIFTED,), (PACKED,), (SHIFTED, PACKED))
}

_ROW = ("input_ids", "attention_mask", "position_ids")
# Of a batch, what leaves the logits of its ids as they are. Anything else (images, embeddings,
# token types) is not in the cache's key.
_HARMLESS = (
    *_ROW, "labels", "shift_labels", "num_items_in_batch", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "output_router_logits", "logits_to_keep",
    "cache_position", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
)  # fmt: skip
DATED = "rows with the day"  # in `made_with`: the chat template writes what day it is
OF_A_DAY = (
    "a cache is good for that day, unless the same `chat_template_kwargs` name one, as "
    '{"date_string": ...} of Llama 3\'s template does for anchors'
)
_SHOWN = 8  # ids of a row that is missing


class LookUp(NamedTuple):
    """What a batch's rows have in the cache.

    Attributes:
        values: (B, T, K) float32 on the CPU, NaN where there is nothing: at padding.
        layouts: how the rows differ from those the cache was made of: "shifted" (the first
            position is not 0, as with padding in front), "packed" (several rows in one).
    """

    values: Tensor
    layouts: frozenset[str]


class CachedReference:
    """The reference's safety logits of a tokenised data set, from a folder.

    Made by `str-kernels cache build`, given to `attach(model, tokens, reference=...)`. A row is
    found by its ids, whatever the batch's order, size and padding; packed rows are looked up one by
    one where `position_ids` start at 0 again. The reference's forward is then never run, and its
    adapters, a second model or a frozen base are not needed: a model whose every weight is trained
    has a reference too.

    Args:
        folder: of the cache.
        check_model: let `attach` compare the model's base weights with those that the cache was
            made from. False for a full fine-tuning that is resumed, whose weights have moved.

    Raises:
        ValueError: the folder is not a whole cache; names the file and what is wrong with it.

    Notes:
        Sizes, names and tables are checked when the cache is opened; each row's values by their
        SHA-256 each time they are served, so that a bit that flips later is found too. A file that
        is cut in the very moment between that look and the copy ends the process (SIGBUS).
        Values are those of the row by itself, in the cache's dtype: bfloat16 keeps 8 bits, a step
        of 0.125 at a logit of 20; a model in 16 bits rounds a little differently in each batch, so
        that the drift of its first step is small and not exactly 0.
        A label on the first token after padding in front makes the loss NaN: of the padding before
        it there is nothing to compare. Prompts have no labels there anyway.
        On a GPU the look-up in a forward waits for the device, since the ids have to be read;
        `with_collator` does it in the data loader.

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
        """Open the folder again: in a worker of a data loader, in a copy."""
        return type(self), (self.folder, self.check_model)

    def __repr__(self) -> str:
        """Name the folder and what it holds."""
        plan = self.plan
        return (
            f"CachedReference({str(self.folder)!r}): {plan.rows} rows of {plan.ids} {plan.values}"
        )

    def check_tokens(self, safety_tokens: SafetyTokens) -> None:
        """Raise ValueError unless these are the tokens that the cache was made for."""
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
        """Raise ValueError unless the cache holds what the penalty compares."""
        if log_probs != (self.plan.values == "log_probs"):
            wanted = "log_probs" if log_probs else "logits"
            raise ValueError(
                f"`penalty` must be of a kind that compares {self.plan.values}, which is what "
                f"{self.folder} holds; got one that compares {wanted}: build a cache with --kind"
            )

    def check_fingerprint(self, fingerprint: str) -> None:
        """Raise ValueError unless the cache was made from the model of this fingerprint."""
        if self.check_model and fingerprint != self.plan.model:
            made = ", ".join(f"{name} {text}" for name, text in self.plan.made_with.items())
            raise ValueError(
                f"`model` must have the base weights that the cache in {self.folder} was made from "
                f"({self.plan.model[:12]}; {made}); got {fingerprint[:12]}. Build it again from "
                "this model; CachedReference(folder, check_model=False) is for a full fine-tuning "
                "that is resumed"
            )

    def __call__(self, ids: Tensor, batch: Mapping[str, Any]) -> Tensor:  # (B, T, K)
        """Serve a batch as any function does that `attach` takes as `reference`.

        Args:
            ids: (K,) the safety ids.
            batch: input_ids (B, T) and, where there are, attention_mask and position_ids.

        Returns:
            (B, T, K) float32 on the device of `ids`.

        Raises:
            ValueError: a row is not in the cache, or its layout needs a look at the model, which
                only `attach` has.
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
                are one run in each row; position_ids (B, T) or (1, T), each run of which starts
                at 0. Nothing else that logits depend on.

        Returns:
            The values and the layouts seen.

        Raises:
            ValueError: a row is not in the cache (it was cut, joined or never there), named by its
                number and first ids; the batch has other inputs; a file is damaged.
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
        """Return a collator that adds the looked-up values, on the CPU, in the data loader.

        The attached model takes them out of its batch, and its forward does not wait for the
        device.

        Args:
            collator: makes a batch of rows, with input_ids.
        """
        return _Collator(self, collator)

    def measure_look_up(self, tokens: int = 1000) -> tuple[int, float]:
        """Return how many tokens were looked up, at least `tokens` if there are, and seconds."""
        done, start = 0, time.perf_counter()
        for shard, number in self._where.values():
            done += shard.row(number).shape[0]
            if done >= tokens:
                break
        return done, time.perf_counter() - start


class _Collator:
    """A class and not a closure, so that workers of a data loader can be given it."""

    def __init__(self, cached: CachedReference, collator: Callable[[Any], Any]) -> None:
        self.cached, self.collator = cached, collator

    def __call__(self, rows: Any) -> Any:
        batch = self.collator(rows)
        found = self.cached.look_up(batch)
        batch[KEYS[found.layouts]] = found.values
        return batch


def take_from(batch: dict[str, Any]) -> LookUp | None:
    """Take out of a batch what `with_collator` put in; None where it did not."""
    found = None
    for layouts, key in KEYS.items():
        values = batch.pop(key, None)
        if values is not None:
            found = LookUp(values, layouts)
    return found


def check_batch(batch: Mapping[str, Any]) -> None:
    """Refuse a batch whose logits depend on more than its ids."""
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
    """Read everything in a cache and compare it with its checksums.

    Args:
        folder: of the cache.
        on_shard: called with the number of shards read and their number.

    Returns:
        One line for each thing that is broken; none for a whole cache.
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
            CachedReference(folder)  # no row is there twice
    except ValueError as error:
        broken.append(str(error))
    return broken


def read_timings(folder: Path | str) -> tuple[int, float]:
    """Return how many tokens' passes were timed when the cache was built, and their seconds.

    Nothing is served from there, so that a file that cannot be read is one that has nothing.
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
    """Yield each row's stretches: row, first column, column after the last, layouts."""
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
