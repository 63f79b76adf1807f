"""What an evaluation is given: models, adapters, prompts; each with a hash of its content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..evals.prompt_sets import read_prompt_rows
from ..safety_tokens import SafetyTokens
from ..tokenizer import tokenizer_hash
from .builtin_model import builtin_model_folder
from .eval_stages import files_hash, json_hash
from .loading import BUILTIN, load_model
from .peft_adapters import is_peft_model

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class PromptList:
    """The prompts of one kind, and what they are called."""

    name: str
    prompts: list[str]

    @classmethod
    def load(
        cls, kind: str, name_or_path: str, limit: int | None, column: str | None
    ) -> PromptList:
        """Read a set by name or a file, the first `limit` prompts of a kind in it."""
        rows = read_prompt_rows(kind, name_or_path, column=column, kind=kind)[:limit]
        return cls(Path(name_or_path).name, [row.prompt for row in rows])

    def describe(self) -> dict[str, Any]:
        """Return name, count and hash; the hash is of the prompts in their order alone."""
        return {
            "set": self.name,
            "count": len(self.prompts),
            "sha256": json_hash(self.prompts),
        }


@dataclass(frozen=True)
class NamedModel:
    """A model, its tokenizer, and what they are called in a report.

    Args:
        model: a causal LM, or a PeftModel of it.
        tokenizer: of the model.
        described: name, sha256, dtype, device and parameters.
        adapter: name, sha256 and type of its adapter, None without.
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
        """Load "builtin", a folder or a hub id, and an adapter folder on it, from safetensors."""
        if adapter is not None:
            _check_adapter_files(adapter)
        model, tokenizer = load_model(name, dtype=dtype, progress=progress)
        described = {
            "name": name if not Path(name).is_dir() else Path(name).resolve().name,
            "sha256": _model_hash(name, model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        if not tokenizer.chat_template:
            raise ValueError(
                f"`model` must have a chat template, which prompts are asked in; got {name!r} "
                "without one"
            )
        if adapter is None:
            return cls(model, tokenizer, described, None)
        peft_model = _with_adapter(model, adapter)
        return cls(peft_model, tokenizer, described, _describe_adapter(peft_model, adapter))


def load_safety_tokens(path: Path | None, tokenizer: Any) -> SafetyTokens:
    """Read a safety_tokens.json of this tokenizer, or take the tokens of the built-in templates."""
    if path is not None:
        return SafetyTokens.load(path, tokenizer)
    return SafetyTokens.from_templates(tokenizer)


def load_reference(name: str, dtype: str, tokenizer: Any) -> NamedModel:
    """Load the model that drift is measured from; it must cut text as `tokenizer` does."""
    reference = NamedModel.load(name, None, dtype)
    if tokenizer_hash(reference.tokenizer) != tokenizer_hash(tokenizer):
        raise ValueError(
            f"`reference` must have the tokenizer of `model`; that of {name!r} is another"
        )
    return reference


def _model_hash(name: str, model: Any) -> str:
    folder = builtin_model_folder() if name == BUILTIN else Path(name)
    if folder.is_dir():
        files = (path for path in folder.iterdir() if not path.name.startswith("."))
        return files_hash(path for path in files if path.is_file())
    # of a hub id the files are wherever the hub's library puts them: what was loaded is hashed
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_adapter_files(adapter: Path) -> None:
    missing = [name for name in _ADAPTER_FILES if not (adapter / name).is_file()]
    if missing:
        pickled = (adapter / "adapter_model.bin").is_file()
        why = "; adapter_model.bin is a pickle and is not read" if pickled else ""
        raise ValueError(
            f"`adapter` must be a folder with {' and '.join(_ADAPTER_FILES)}; {adapter} has no "
            f"{' and no '.join(missing)}{why}"
        )


def _with_adapter(model: Any, adapter: Path) -> Any:
    from peft import PeftConfig, PeftModel

    try:
        kind = PeftConfig.from_pretrained(str(adapter)).peft_type
        if getattr(kind, "value", kind) == "XLORA":
            raise ValueError("XLORA loads further adapters, from wherever its config says")
        # of two files peft reads the safetensors, which is there
        return PeftModel.from_pretrained(model, str(adapter)).eval()
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"`adapter` must be one of this model; {adapter} cannot be put on it: {error}"
        ) from error


def _describe_adapter(model: Any, adapter: Path) -> dict[str, Any]:
    if not is_peft_model(model):
        raise TypeError(f"`model` must be a PeftModel; got {type(model).__name__}")
    kind = model.active_peft_config.peft_type
    return {
        "name": adapter.resolve().name,
        "sha256": files_hash(adapter / name for name in _ADAPTER_FILES),
        "type": str(getattr(kind, "value", kind)),
    }
