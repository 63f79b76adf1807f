"""Loads models, tokenizers and adapters from a name or a folder; also the built-in model."""

from __future__ import annotations

from .adapter_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapter_folder,
    base_name,
    check_adapter_files,
    put_adapter,
)
from .builtin_model import BUILTIN, builtin_model_folder
from .models import load_model, load_parts, load_tokenizer, longest_row

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "BUILTIN",
    "adapter_folder",
    "base_name",
    "builtin_model_folder",
    "check_adapter_files",
    "load_model",
    "load_parts",
    "load_tokenizer",
    "longest_row",
    "put_adapter",
]
