"""Adapters on disk: their files, their base model, and loading them onto it."""

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
    """Return the folder of an adapter's files, or None if the source is a full model.

    Args:
        source: a folder or a hub id. An adapter's files are downloaded from the hub.

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
    """Return the name of an adapter's base model, in the form that `load_model` takes.

    Args:
        adapter: a folder with an adapter_config.json.

    Returns:
        A folder, a hub id, or "builtin" if the config names the built-in model's folder of another
        machine.

    Raises:
        ValueError: the config names no base, or is not JSON.
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
        argument: the argument's name, for messages.
        adapter: the folder.

    Raises:
        ValueError: a file is missing; the message names it.
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
    """Load a saved adapter onto a model, and check that all of it was loaded.

    Args:
        argument: the argument's name, for messages.
        model: a causal LM without adapters.
        adapter: a folder with adapter_config.json and adapter_model.safetensors.
        trainable: make the adapter trainable.

    Returns:
        A PeftModel, in eval mode.

    Raises:
        ValueError: a file is missing or damaged, or the adapter is for another model.
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
            warnings.simplefilter("ignore")  # about keys; they are compared below
            # peft prefers safetensors to a pickle, and check_adapter_files has found it
            made = PeftModel.from_pretrained(
                model, str(adapter), is_trainable=trainable and not config.is_prompt_learning
            ).eval()
        expected = set(get_peft_model_state_dict(made, save_embedding_layers=False))
    except Exception as error:  # tokenizers, safetensors and PEFT raise their own classes
        raise ValueError(
            f"`{argument}` must be an adapter of this model; {adapter} cannot be put on it: "
            f"{reason_of(error, adapter)}"
        ) from error
    # an adapter of a model with added tokens also holds the full embeddings
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
