"""Adapters on disk: their files, the model they are for, and the way onto it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from safetensors import safe_open

from .builtin_model import BUILTIN, BUILTIN_NAME
from .file_faults import file_of, first_names, reason_of

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter_folder(source: str) -> Path | None:
    """Return the folder of an adapter's files, None of a model that is none.

    Args:
        source: a folder, or a hub id, whose adapter's files are then downloaded.

    Returns:
        A folder on this machine, or None.
    """
    config = None if source == BUILTIN else file_of(source, ADAPTER_CONFIG)
    if config is None:
        return None
    if not Path(source).is_dir():
        file_of(source, ADAPTER_WEIGHTS)
    return config.parent


def base_name(adapter: Path) -> str:
    """Return the name of the model that an adapter is for, as `load_model` takes it.

    Args:
        adapter: a folder with an adapter_config.json.

    Returns:
        A folder, a hub id, or "builtin" where the built-in model's folder has another place here.

    Raises:
        ValueError: the config names none, or is no JSON.
    """
    config = adapter / ADAPTER_CONFIG
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`model` must have a readable {config}; got {reason_of(error, adapter)}"
        ) from error
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"`model` must name its base as base_model_name_or_path in {config}; got {base!r}"
        )
    if Path(base).is_dir():
        return base
    if (adapter / base).is_dir():
        return str(adapter / base)
    return BUILTIN if Path(base).name.startswith(f"{BUILTIN_NAME}-") else base


def check_adapter_files(argument: str, adapter: Path) -> None:
    """Refuse a folder that lacks a file of an adapter.

    Args:
        argument: what the caller's messages call it.
        adapter: the folder.

    Raises:
        ValueError: names what is not there.
    """
    missing = [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (adapter / name).is_file()]
    if missing:
        pickled = (adapter / "adapter_model.bin").is_file()
        why = "; adapter_model.bin is a pickle and is not read" if pickled else ""
        raise ValueError(
            f"`{argument}` must be a folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}; {adapter} "
            f"has no {' and no '.join(missing)}{why}"
        )


def put_adapter(argument: str, model: Any, adapter: Path, *, trainable: bool = False) -> Any:
    """Put a saved adapter on a model, all of it.

    Args:
        argument: what the caller's messages call the adapter.
        model: a causal LM without adapters.
        adapter: a folder with adapter_config.json and adapter_model.safetensors.
        trainable: the adapter can be trained further.

    Returns:
        A PeftModel, in eval mode.

    Raises:
        ValueError: a file is missing or damaged, or the adapter is not one of this model.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    check_adapter_files(argument, adapter)
    try:
        config = PeftConfig.from_pretrained(str(adapter))
        if getattr(config.peft_type, "value", config.peft_type) == "XLORA":
            raise ValueError("XLORA loads further adapters, from wherever its config says")
        with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
            given = set(file.keys())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys: they are compared below
            # of two files peft reads the safetensors, which is there
            made = PeftModel.from_pretrained(
                model, str(adapter), is_trainable=trainable and not config.is_prompt_learning
            ).eval()
        expected = set(get_peft_model_state_dict(made, save_embedding_layers=False))
    except Exception as error:  # tokenizers, safetensors and PEFT have classes of their own
        raise ValueError(
            f"`{argument}` must be an adapter of this model; {adapter} cannot be put on it: "
            f"{reason_of(error, adapter)}"
        ) from error
    # an adapter of a model with more tokens brings the embeddings along, whole
    for what, names in (
        ("not in its file", expected - given),
        ("of no layer here", given - expected - set(made.state_dict())),
    ):
        if names:
            raise ValueError(
                f"`{argument}` must be an adapter of this model; of {adapter} "
                f"{first_names(names)} {'is' if len(names) == 1 else 'are'} {what}"
            )
    return made
