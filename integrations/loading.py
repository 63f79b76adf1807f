"""Every command's model: a name, a folder or a hub id becomes a causal LM and its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .builtin_model import builtin_model_folder

BUILTIN = "builtin"
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    name: str, *, dtype: str = "auto", progress: Callable[[str], None] | None = None
) -> tuple[Any, Any]:
    """Load a causal LM and its tokenizer from safetensors, without remote code.

    Args:
        name: "builtin", a folder, or the id of a model on the hub (which transformers then
            downloads).
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        progress: called with a line of text when something takes seconds.

    Returns:
        Model and tokenizer, on the GPU if there is one. The tokenizer has a padding token.

    Raises:
        ValueError: the name or dtype is wrong, or the model cannot be loaded; says why.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(_DTYPES)}; got {dtype!r}")
    source = str(builtin_model_folder(progress=progress)) if name == BUILTIN else name
    try:
        # unset, transformers would ask at the terminal, and a "y" would run the folder's code
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`model` must be 'builtin', a folder or a hub id of a causal LM; got {name!r}: {error}"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return (model if device is None else model.to(device)), tokenizer
