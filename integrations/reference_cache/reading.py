"""A reference cache for attach(): computed from a model, and used in place of one."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ...op import ON_LOG_PROBS, check_backend
from ...reference_cache import (
    KEYS,
    PACKED,
    SHIFTED,
    BuildReport,
    CachedReference,
    LookUp,
    build_reference_cache,
    check_batch,
    take_from,
)
from ...tokens import SafetyTokens
from ..models import (
    AdaptersOff,
    CallableReference,
    PathName,
    Reference,
    ReferenceFunction,
    base_of,
    check_adapters,
    check_path,
    checkpoints,
    evaluation_mode,
    has_adapters,
    is_prompt_learning,
    make_path,
    not_compiled,
    read_safety_logits,
    runs_the_model,
)
from .fingerprint import model_fingerprint

_PROBE = 6  # tokens of the row that is tried in two layouts
_WHAT = {
    SHIFTED: "rows that do not start at position 0 (padding in front)",
    PACKED: "rows packed one after the other",
}


def given_reference(
    reference: ReferenceFunction, model: nn.Module, tokens: SafetyTokens, kind: str
) -> Reference:
    """Return the reference of attach() from a caller's function or a cache.

    Raises:
        ValueError: the cache is of another model, of other tokens or for another kind of penalty.
    """
    if not isinstance(reference, CachedReference):
        return CallableReference(reference)
    reference.check_tokens(tokens)
    reference.check_values(kind in ON_LOG_PROBS)
    if reference.check_model:
        reference.check_fingerprint(model_fingerprint(model))
    return FromCache(reference, base_of(model))


class FromCache(Reference):
    """Reads the reference's logits of each batch from a cache.

    The cache holds the logits of single rows. A model that counts positions from the padding, or
    lets packed rows attend to each other, gives the same rows other logits in another layout. So
    the first batch in such a layout is preceded by a test of the model on a few tokens.
    """

    def __init__(self, cached: CachedReference, inner: nn.Module) -> None:
        self.cached, self.inner = cached, inner
        self.forward: Callable[..., Any] = inner.forward
        self._agrees: dict[tuple[str, bool, bool, bool], bool] = {}
        self._hook: Any = None
        self._given: LookUp | None = None

    @override
    def open(self) -> None:
        self._hook = self.inner.register_forward_pre_hook(self._take, with_kwargs=True)

    @override
    def close(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    @not_compiled
    def _take(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Take the collator's extra columns out of the model's inputs, in evaluation too."""
        if not any(key in kwargs for key in KEYS.values()):
            self._given = None
            return None
        kwargs = dict(kwargs)
        self._given = take_from(kwargs)
        return args, kwargs

    @override
    @not_compiled
    def skip(self, batch: dict[str, Any]) -> None:
        take_from(batch)
        self._given = None

    @override
    @not_compiled
    def __call__(self, ids: Tensor, batch: dict[str, Any], log_probs: bool) -> Tensor:
        self.cached.check_values(log_probs)  # at each step, since the penalty's kind may change
        found, self._given = take_from(batch) or self._given, None
        check_batch(batch)
        if found is None:
            found = self.cached.look_up(batch)
        shape = (*batch["input_ids"].shape, len(ids))
        if found.values.shape != shape:
            raise ValueError(f"`ref_safety_logits` must be {shape}; got {found.values.shape}")
        for layout in found.layouts:
            self._check(layout, batch)
        return found.values.to(ids.device)

    def _check(self, layout: str, batch: dict[str, Any]) -> None:
        """Raise unless the model gives rows in this layout the logits of each row by itself."""
        use_cache = self._uses_cache(batch)
        masked = batch.get("attention_mask") is not None
        counted = batch.get("position_ids") is not None
        key = (layout, masked, counted, use_cache)
        if key not in self._agrees:
            self._agrees[key] = self._probe(*key, device=batch["input_ids"].device)
        if not self._agrees[key]:
            with_mask = ", with an attention_mask" if masked else ""
            with_cache = " and use_cache on" if use_cache else ""
            raise ValueError(
                f"`reference` must not be a cache for {_WHAT[layout]}{with_mask}{with_cache}: of "
                f"such rows {type(self.inner).__name__} says something else than of each by "
                "itself. Pad on the right; pack without attention_mask, with position_ids and "
                "use_cache=False"
            )

    def _uses_cache(self, batch: dict[str, Any]) -> bool:
        """Tell whether the student makes a KV cache, with which packed rows are not separated."""
        if checkpoints(self.inner):
            return False  # in training
        asked = batch.get("use_cache")
        return bool(getattr(self.inner.config, "use_cache", False) if asked is None else asked)

    @runs_the_model
    def _probe(
        self, layout: str, masked: bool, counted: bool, use_cache: bool, *, device: torch.device
    ) -> bool:
        """Tell whether a row has the same centred logits in the layout as by itself."""
        inner: Any = self.inner
        vocab_size = inner.get_input_embeddings().weight.shape[0]
        count = torch.arange(2 * _PROBE, device=device)[None]
        ids = (vocab_size // 3 + count) % vocab_size  # the first ids are often special
        alone = ids[:, _PROBE:]
        batch: dict[str, Any] = {"input_ids": ids}
        if masked:
            first = 1 if layout == PACKED else 0
            batch["attention_mask"] = torch.where(count < _PROBE, first, 1)
        if counted:
            batch["position_ids"] = count if layout == SHIFTED else count % _PROBE
        if layout == SHIFTED and not masked:  # only the positions are shifted
            batch = {"input_ids": alone, "position_ids": count[:, _PROBE:]}

        def logits(which: slice, **inputs: Tensor) -> Tensor:  # (_PROBE, V)
            found: Tensor = self.forward(**inputs, use_cache=use_cache).logits[0, which].float()
            return found - found.mean(dim=-1, keepdim=True)

        with torch.no_grad(), evaluation_mode(self.inner):
            here = logits(slice(None), input_ids=alone)
            # later tokens cannot change a row, so this shows the rounding of other shapes
            longer = logits(slice(_PROBE), input_ids=torch.cat([alone, alone], dim=1))
            try:
                there = logits(slice(-_PROBE, None), **batch)
            except (
                TypeError,
                ValueError,
                RuntimeError,
                LookupError,
            ):  # it refuses such a batch
                return False
        # wrong positions, or attention to another row, change the logits by far more
        rounding = max(1e-4, 4 * torch.finfo(inner.dtype).eps) * here.norm()
        return bool((there - here).norm() <= torch.maximum(4 * (longer - here).norm(), rounding))


def cache_model(
    model: Any,
    rows: Sequence[Sequence[int]],
    safety_tokens: SafetyTokens,
    folder: Path | str,
    *,
    kind: str = "mse",
    path: PathName = "linear",
    backend: str = "auto",
    chunk_bytes: int | None = None,
    on_tokens: Callable[[int, int], None] | None = None,
    made_with: Mapping[str, str] | None = None,
    **options: Any,
) -> BuildReport:
    """Compute a frozen model's safety logits once for every distinct row, and store them.

    Args:
        model: the aligned model; if it has adapters, they are switched off.
        rows: the ids of each row, without padding.
        safety_tokens: the K ids, at least one.
        folder: the folder to make, or of an interrupted run to resume.
        kind: of the penalty that will be used: "logprob" and "coarse_kl" compare log-probabilities.
        path: as in `attach`.
        backend: as in `attach`.
        chunk_bytes: as in `attach`.
        on_tokens: called with the number of tokens done and in total.
        made_with: further details of the run to record in the cache.
        options: dtype, rows_per_shard, batch_tokens, overwrite of `build_reference_cache`.

    Returns:
        A report of what was computed.

    Raises:
        ValueError: model, tokens or folder are wrong; the message says how.
        OSError: the disk is full; the cache so far is intact, and the same call resumes.

    Notes:
        The model runs in eval mode without gradient, on rows of similar length padded on the right.
        The other rows of a batch change the last bits of a row's logits.
    """
    check_path(path)
    check_backend(backend)
    if not len(safety_tokens):
        raise ValueError("`safety_tokens` must hold at least one id to be cached; got none")
    if is_prompt_learning(model):
        raise ValueError("`model` must be cached before it has virtual tokens; got a PeftModel")
    inner = base_of(model)
    way = make_path(inner, path, chunk_bytes, backend)
    forward = inner.forward
    off = None
    if has_adapters(model):
        check_adapters(model)
        off = AdaptersOff(model, inner, forward, way)
    log_probs = kind in ON_LOG_PROBS
    device = next(inner.parameters()).device
    ids = safety_tokens.ids_on(way.device or device)

    def make(chosen: list[list[int]]) -> Tensor:  # (tokens, K)
        lengths = torch.tensor([len(row) for row in chosen])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        input_ids = torch.zeros(mask.shape, dtype=torch.int64)
        input_ids[mask] = torch.tensor([token for row in chosen for token in row])
        batch = {"input_ids": input_ids.to(device), "attention_mask": mask.long().to(device)}
        if off is not None:
            values = off(ids, batch, log_probs)
        else:
            values = read_safety_logits(inner, forward, way, ids, batch, log_probs)
        return values[mask.to(values.device)]

    way.open()
    try:
        return build_reference_cache(
            folder,
            rows,
            make,
            model=model_fingerprint(model),
            safety_tokens=safety_tokens.fingerprint,
            tokenizer=safety_tokens.tokenizer_hash,
            ids=len(safety_tokens),
            values="log_probs" if log_probs else "logits",
            made_with={
                "architecture": type(inner).__name__,
                "backend": backend,
                "device": device.type,
                "dtype": str(next(inner.parameters()).dtype).removeprefix("torch."),
                "path": path,
                **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
                **(made_with or {}),
            },
            on_tokens=on_tokens,
            **options,
        )
    finally:
        way.close()
