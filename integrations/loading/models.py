"""Load a causal LM and its tokenizer from a name, a folder or a hub id, for every command.

Faults that transformers and PEFT only warn about, or ignore, are errors here: a weight that is
missing from the file would be random, in a model that may be the reference of a training run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..models import base_of
from .adapter_files import (
    ADAPTER_CONFIG,
    adapter_folder,
    base_name,
    check_adapter_files,
    put_adapter,
)
from .builtin_model import BUILTIN, builtin_model_folder
from .file_faults import check_texts, file_of, first_names, reason_of

_DTYPES = ("auto", "float32", "bfloat16", "float16")
# Names in configs for the maximum number of positions; transformers maps most to the first.
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Load a causal LM and its tokenizer from safetensors, without remote code.

    Args:
        name: "builtin", a folder, or a hub id (which transformers then downloads). It holds a
            model, or an adapter whose config names its base model.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        progress: called with a line of text before anything that takes seconds, and when the
            padding token is replaced.
        options: of `from_pretrained`: attn_implementation, quantization_config, revision.

    Returns:
        Model and tokenizer, on the GPU if there is one. For an adapter the model is a PeftModel
        with a trainable adapter. The tokenizer has a padding token inside the model's vocabulary.

    Raises:
        ValueError: the name or dtype is wrong, or the model cannot be loaded completely; the
            message says why.
    """
    parts = load_parts(name, dtype=dtype, progress=progress, **options)
    if parts.adapter is None:
        return parts.model, parts.tokenizer
    return put_adapter("model", parts.model, parts.adapter, trainable=True), parts.tokenizer


@dataclass(frozen=True)
class ModelParts:
    """A model, its tokenizer, and the folder of its adapter.

    Args:
        name: of the base model, as `load_model` takes it.
        model: the base model, without the adapter.
        tokenizer: the adapter's own if it has one, else the base model's.
        adapter: the folder of the adapter's files, or None for a full model.
    """

    name: str
    model: Any
    tokenizer: Any
    adapter: Path | None


def load_parts(
    name: str,
    *,
    dtype: str = "auto",
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> ModelParts:
    """Load a model and its tokenizer as `load_model` does, but do not apply its adapter.

    Args:
        name: as in `load_model`.
        dtype: as in `load_model`.
        progress: as in `load_model`.
        options: as in `load_model`.

    Returns:
        The model without its adapter, and the adapter's folder.

    Raises:
        ValueError: as in `load_model`.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(_DTYPES)}; got {dtype!r}")
    source = _source_of(name, progress)
    adapter = adapter_folder(source)
    if adapter is None:
        # first, since a folder without a tokenizer is most likely no model's folder at all
        tokenizer = _load_tokenizer(name, source)
        base, model = name, _load_weights(name, source, dtype, options)
    else:
        check_adapter_files("model", adapter)
        base = base_name(adapter)
        base_source = _source_of(base, progress)
        if adapter_folder(base_source) is not None:
            raise ValueError(
                f"`model` must be an adapter of a full model; {name!r} is one of {base}, which is "
                "an adapter itself"
            )
        try:
            tokenizer = load_tokenizer(name, progress=progress)
            model = _load_weights(base, base_source, dtype, options)
        except ValueError as error:
            raise ValueError(
                f"`model` must be an adapter whose base can be loaded; {name!r} names {base!r} in "
                f"its {ADAPTER_CONFIG}: {error}"
            ) from error
    _choose_padding(name, model, tokenizer, progress)
    return ModelParts(base, model, tokenizer, adapter)


def load_tokenizer(name: str, *, progress: Callable[[str], None] | None = None) -> Any:
    """Load only a model's tokenizer.

    Args:
        name: as in `load_model`.
        progress: called with a line of text before anything that takes seconds.

    Returns:
        The tokenizer.

    Raises:
        ValueError: there is none, or it cannot be read; the message says why.
    """
    source = _source_of(name, progress)
    adapter = adapter_folder(source)
    if adapter is not None and not _has_tokenizer(source):
        name = base_name(adapter)
        source = _source_of(name, progress)
    return _load_tokenizer(name, source)


def longest_row(model: nn.Module) -> int | None:
    """Return the maximum number of tokens in a row, or None if the config has no limit.

    Args:
        model: a causal LM, or a PeftModel of one.

    Returns:
        The number of positions. A longer row raises in models with a table of positions; other
        models were not trained on rows of that length.
    """
    config: Any = base_of(model).config
    config = config.get_text_config(decoder=True)
    found = (getattr(config, name, None) for name in _POSITIONS)
    limit = next((limit for limit in found if isinstance(limit, int) and limit > 0), None)
    if limit is None:
        return None
    # RoBERTa and similar models count positions from the padding index on
    tables = (
        module.num_embeddings - module.padding_idx - 1
        for name, module in base_of(model).named_modules()
        if name.endswith("position_embeddings")
        and isinstance(module, nn.Embedding)
        and module.padding_idx is not None
    )
    return min([limit, *tables])


def _source_of(name: str, progress: Callable[[str], None] | None) -> str:
    """Return the source for from_pretrained; folders as full paths, since adapters record them."""
    if name == BUILTIN:
        return str(builtin_model_folder(progress=progress))
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _load_weights(name: str, source: str, dtype: str, options: dict[str, Any]) -> Any:
    must = "`model` must be 'builtin', a folder or a hub id of a causal LM"
    check_texts(name, Path(source))
    try:
        # if unset, transformers asks at the terminal, and a "y" would run the folder's code
        model, found = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below by name
            **options,
        )
    except Exception as error:  # tokenizers and safetensors raise their own classes
        raise ValueError(f"{must}; got {name!r}: {_why(name, source, error)}") from error
    mismatched = {
        f"{key} ({tuple(stored)} in the file, {tuple(made)} by the config)"
        for key, stored, made in found["mismatched_keys"]
    }
    if mismatched:
        raise ValueError(
            f"`model` must have the sizes that its config says; {name!r} has others: "
            f"{first_names(mismatched)}"
        )
    # a missing buffer is set by its class, and a tied weight is not missing
    parameters = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    missing = set(found["missing_keys"]) & parameters
    if missing:
        raise ValueError(
            f"`model` must have all its weights; {name!r} lacks {len(missing)}, which would be "
            f"random: {first_names(missing)}"
        )
    if "quantization_config" in options or not torch.accelerator.is_available():
        return model  # bitsandbytes has placed it already
    device = torch.accelerator.current_accelerator()
    rank = int(os.environ.get("LOCAL_RANK", "0"))  # set by torchrun
    return model.to(torch.device(device.type, rank) if device is not None else "cpu")


def _load_tokenizer(name: str, source: str) -> Any:
    check_texts(name, Path(source))
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(
            f"`model` must be 'builtin', a folder or a hub id with a tokenizer; got {name!r}: "
            f"{_why(name, source, error)}"
        ) from error


def _why(name: str, source: str, error: Exception) -> str:
    """Say why a name gave no model; a mistyped folder was taken for a hub id."""
    reason = reason_of(error, Path(source))
    if Path(source).exists():
        return reason
    # a hub id is "name" or "owner/name", and the hub's rules for one explain nothing of a path
    path = Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    return "there is no such folder" if path else f"no folder here, nor on the hub: {reason}"


def _choose_padding(
    name: str, model: Any, tokenizer: Any, progress: Callable[[str], None] | None
) -> None:
    """Make sure that the model has an embedding for the padding token."""
    rows = model.get_input_embeddings().weight.shape[0]
    padding = tokenizer.pad_token_id
    if padding is not None and padding < rows:
        return
    for token in (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token):
        if token is not None and tokenizer.convert_tokens_to_ids(token) < rows:
            break
    else:
        raise ValueError(
            f"`model` must have a tokenizer with a padding or an end token among its {rows} "
            f"embeddings; got {name!r} with {padding} and {tokenizer.eos_token_id}"
        )
    if padding is not None and progress is not None:
        progress(f"padding is {token!r}: token {padding} is outside of the model's {rows}")
    tokenizer.pad_token = token


def _has_tokenizer(source: str) -> bool:
    return any(file_of(source, name) for name in ("tokenizer_config.json", "tokenizer.json"))
