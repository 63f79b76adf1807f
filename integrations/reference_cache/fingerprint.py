"""A fingerprint of a model's base weights, which is the same with and without adapters."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ...files import tensor_sha256
from ..models import base_of

# Config entries that do not change the logits: the model's origin, how it is run, and what Trainer
# and generate() set. Names with a leading underscore, transformers' own notes, are skipped too.
_NOT_THE_MODEL = {
    "architectures", "attn_implementation", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "experts_implementation", "gradient_checkpointing", "id2label", "label2id",
    "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id",
    "problem_type", "quantization_config", "return_dict", "torch_dtype", "transformers_version",
    "use_cache",
}  # fmt: skip


def model_fingerprint(model: nn.Module) -> str:
    """Return a SHA-256 of everything that determines a model's logits without its adapters.

    The hash covers name, shape, dtype and bytes of every parameter and persistent buffer that is
    not an adapter's, and the config entries that may change the logits. A PeftModel has the same
    fingerprint as its model had before PEFT, also with trained copies (modules_to_save), which
    count as adapters. Changing one bit of one weight changes the fingerprint.

    Args:
        model: any model with its weights in memory.

    Returns:
        64 hex digits.

    Raises:
        ValueError: a weight is not in memory (meta, offloaded), or is a shard.

    Notes:
        Weights on a GPU are copied to the CPU, 16 MiB at a time; SHA-256 reads about 1 GB per
        second. The scales of quantised layers are not covered.
    """
    base = base_of(model)
    digest = hashlib.sha256(_config_text(getattr(base, "config", None)).encode())
    known: dict[int, str] = {}  # a tied weight is read once
    stored = {id(tensor) for tensor in base.state_dict(keep_vars=True).values()}
    for name, tensor in sorted(_base_tensors(base, ""), key=lambda item: item[0]):
        if id(tensor) not in stored:  # a buffer computed from the config
            continue
        if id(tensor) not in known:
            known[id(tensor)] = _tensor_digest(name, tensor)
        dtype = str(tensor.dtype)
        digest.update(json.dumps([name, list(tensor.shape), dtype, known[id(tensor)]]).encode())
    return digest.hexdigest()


def _base_tensors(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that the model had before PEFT, under their names of then."""
    adapters = {*_names(module, "adapter_layer_names"), *_names(module, "other_param_names")}
    inside: Any = getattr(module, "base_layer", None) if adapters else None
    if inside is None and type(module).__module__.startswith("peft."):
        inside = getattr(module, "original_module", None)  # modules_to_save, trainable tokens
    if isinstance(inside, nn.Module):
        yield from _base_tensors(inside, prefix)
        return
    parameters = module.named_parameters(recurse=False, remove_duplicate=False)
    buffers = module.named_buffers(recurse=False, remove_duplicate=False)
    for name, tensor in itertools.chain(parameters, buffers):
        if name not in adapters:
            yield prefix + name, tensor
    for name, child in module.named_children():
        if name not in adapters:
            yield from _base_tensors(child, f"{prefix}{name}.")


def _names(module: nn.Module, attribute: str) -> tuple[str, ...]:
    names = getattr(module, attribute, ())
    return tuple(names) if isinstance(names, (tuple, list)) else ()


def _tensor_digest(name: str, tensor: Tensor) -> str:
    if tensor.is_meta or hasattr(tensor, "placements"):
        raise ValueError(
            f"`model` must have its weights whole and in memory to be compared with a reference "
            f"cache; {name} is not. Attach before it is sharded, or use CachedReference(folder, "
            "check_model=False)"
        )
    return tensor_sha256(tensor).hex()


def _config_text(config: Any) -> str:
    content = config.to_dict() if hasattr(config, "to_dict") else {}
    return json.dumps(_model_part(content), sort_keys=True, default=str)


def _model_part(value: Any) -> Any:
    """Return a config without the entries that do not change the logits, at any depth."""
    if isinstance(value, dict):
        return {
            str(name): _model_part(part)
            for name, part in value.items()
            if str(name) not in _NOT_THE_MODEL and not str(name).startswith("_")
        }
    if isinstance(value, (list, tuple)):
        return [_model_part(part) for part in value]
    return value
