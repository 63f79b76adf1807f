"""The inputs of an evaluation: models, adapters, prompts, each with a hash of its content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...evals import read_prompt_rows
from ...files import file_sha256, json_sha256, tensor_bytes
from ...tokens import SafetyTokens, tokenizer_hash
from ..loading import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BUILTIN,
    builtin_model_folder,
    check_adapter_files,
    load_parts,
    put_adapter,
)
from ..models import is_peft_model


@dataclass(frozen=True)
class PromptList:
    """The prompts of one kind, and the name of their set or file."""

    name: str
    prompts: list[str]

    @classmethod
    def load(
        cls, kind: str, name_or_path: str, limit: int | None, column: str | None
    ) -> PromptList:
        """Read the first `limit` prompts of a kind from a named set or a file."""
        rows = read_prompt_rows(kind, name_or_path, column=column, kind=kind)[:limit]
        return cls(Path(name_or_path).name, [row.prompt for row in rows])

    def describe(self) -> dict[str, Any]:
        """Return name, count and hash; the hash is over the prompts in order, without the name."""
        return {
            "set": self.name,
            "count": len(self.prompts),
            "sha256": json_sha256(self.prompts),
        }


@dataclass(frozen=True)
class NamedModel:
    """A model, its tokenizer, and their description for a report.

    Args:
        model: a causal LM, or a PeftModel of it.
        tokenizer: the model's.
        described: name, sha256, dtype, device and parameters.
        adapter: name, sha256 and type of its adapter, or None.
    """

    model: Any
    tokenizer: Any
    described: dict[str, Any]
    adapter: dict[str, Any] | None

    @classmethod
    def load(
        cls,
        name: str,
        adapter: Path | None,
        dtype: str,
        progress: Callable[[str], None] | None = None,
    ) -> NamedModel:
        """Load "builtin", a folder or a hub id, with an adapter folder if given, from safetensors.

        If `name` is an adapter, its base model is loaded with that adapter.
        """
        if adapter is not None:
            check_adapter_files("adapter", adapter)
        parts = load_parts(name, dtype=dtype, progress=progress)
        if parts.adapter is not None and adapter is not None:
            raise ValueError(
                f"`model` must be a full model beside `adapter`; got {name!r}, an adapter"
            )
        model, tokenizer = parts.model, parts.tokenizer
        folder = Path(parts.name)
        described = {
            "name": folder.resolve().name if folder.is_dir() else parts.name,
            "sha256": _model_hash(parts.name, model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        if not tokenizer.chat_template:
            raise ValueError(
                f"`model` must have a chat template, which prompts are asked in; got {name!r} "
                "without one"
            )
        argument = "model" if adapter is None else "adapter"
        adapter = adapter or parts.adapter
        if adapter is None:
            return cls(model, tokenizer, described, None)
        peft_model = put_adapter(argument, model, adapter)
        return cls(peft_model, tokenizer, described, _describe_adapter(peft_model, adapter))


def load_safety_tokens(path: Path | None, tokenizer: Any) -> SafetyTokens:
    """Read a safety_tokens.json of this tokenizer, or use the tokens of the built-in templates."""
    if path is not None:
        return SafetyTokens.load(path, tokenizer)
    return SafetyTokens.from_templates(tokenizer)


def load_reference(name: str, dtype: str, tokenizer: Any) -> NamedModel:
    """Load the model that drift is measured from; its tokenizer must equal `tokenizer`."""
    reference = NamedModel.load(name, None, dtype)
    if tokenizer_hash(reference.tokenizer) != tokenizer_hash(tokenizer):
        raise ValueError(
            f"`reference` must have the tokenizer of `model`; that of {name!r} is another"
        )
    return reference


def files_hash(paths: Iterable[Path]) -> str:
    """Return the SHA-256 over the names and contents of files, in any order."""
    return json_sha256({path.name: file_sha256(path) for path in paths})


def _model_hash(name: str, model: Any) -> str:
    folder = builtin_model_folder() if name == BUILTIN else Path(name)
    if folder.is_dir():
        files = (path for path in folder.iterdir() if not path.name.startswith("."))
        return files_hash(path for path in files if path.is_file())
    # the files of a hub id are in the hub library's cache, so the loaded weights are hashed
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in tensor_bytes(tensor):
            digest.update(part)
    return digest.hexdigest()


def _describe_adapter(model: Any, adapter: Path) -> dict[str, Any]:
    if not is_peft_model(model):
        raise TypeError(f"`model` must be a PeftModel; got {type(model).__name__}")
    kind = model.active_peft_config.peft_type
    return {
        "name": adapter.resolve().name,
        "sha256": files_hash(adapter / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)),
        "type": str(getattr(kind, "value", kind)),
    }
