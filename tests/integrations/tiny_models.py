"""Tiny random causal LMs of several architectures, and the naive loss they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
)

VOCAB = 131  # not a multiple of 16, so that the workspace rows are padded
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CONFIGS = {
    "llama": lambda: LlamaConfig(**_SMALL, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**_SMALL, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**_SMALL),
    # a cap that bends the logits of a random model visibly
    "gemma2": lambda: Gemma2Config(**_SMALL, head_dim=8, final_logit_softcapping=2.0),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "granite": lambda: GraniteConfig(**_SMALL, logits_scaling=4.0),
    "mixtral": lambda: MixtralConfig(
        **_SMALL, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.1
    ),
}


def tiny_model(name: str, seed: int) -> Any:
    torch.manual_seed(seed)
    model = Auto.from_config(CONFIGS[name]())
    with torch.no_grad():  # larger logits than a fresh head's, so that the softmax is not flat
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


def fresh_lora(model: Any, **options: Any) -> Any:
    gpt2 = model.config.model_type == "gpt2"
    settings = {
        "r": 4,
        "target_modules": ["c_attn"] if gpt2 else ["q_proj", "v_proj"],
        "fan_in_fan_out": gpt2,
        "task_type": "CAUSAL_LM",
        **options,
    }
    return get_peft_model(model, LoraConfig(**settings))


def with_lora(model: Any, seed: int, **options: Any) -> Any:
    """Add a LoRA that has moved: B = 0 would leave no drift to measure."""
    peft_model = fresh_lora(model, **options)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return peft_model


def quantised_llama(folder: Path, seed: int, inner: int, **options: Any) -> Callable[[], Any]:
    """Save a model of sizes that bitsandbytes packs; return what loads it, with its options."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is of the extra 'dev', and for Linux")
    from transformers import BitsAndBytesConfig

    sizes = {**_SMALL, "hidden_size": 128, "intermediate_size": inner}
    torch.manual_seed(seed)
    Auto.from_config(LlamaConfig(**sizes, tie_word_embeddings=False)).save_pretrained(folder)
    if options.get("load_in_4bit"):
        options["bnb_4bit_compute_dtype"] = torch.float32

    def load() -> Any:
        config = BitsAndBytesConfig(**options)
        place: dict[str, Any] = {"device_map": {"": "cpu"}, "dtype": torch.float32}
        return Auto.from_pretrained(folder, quantization_config=config, **place)

    return load


def checkpoint(model: Any, **options: Any) -> None:
    """Switch gradient checkpointing on."""
    enable = getattr(model.get_base_model(), "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)(options or None)  # its name before 5.20


def batch_of(seed: int, rows: int = 3, length: int = 11) -> dict[str, Tensor]:
    """A right-padded batch whose prompts carry no label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : 2 + row] = -100
        mask[row, length - row :] = 0
        labels[row, length - row :] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def naive_loss(
    model: nn.Module,
    ref_logits: Tensor,  # (B, T, V)
    batch: dict[str, Tensor],
    ids: Tensor,
    weight: float,
    num_items: float | None = None,
    row_weight: Tensor | None = None,  # (B, T - 1)
    compared: Callable[[Tensor], Tensor] = lambda logits: logits,  # or log_softmax
) -> tuple[Tensor, Tensor]:
    """The two-pass loss as one would write it by hand from two full sets of logits."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    output = model(**inputs)
    logits = output.logits[:, :-1].float()
    target = batch["labels"][:, 1:]
    kept = target != -100
    count = kept.sum() if num_items is None else num_items
    ce = nn.functional.cross_entropy(logits[kept], target[kept], reduction="sum") / count
    rows = kept.float() if row_weight is None else row_weight
    drift = compared(logits)[..., ids] - compared(ref_logits[:, :-1].float())[..., ids]
    penalty = (rows * drift.square().mean(dim=-1)).sum() / count
    loss = ce + weight * penalty
    if getattr(output, "aux_loss", None) is not None:
        loss = loss + model.get_base_model().router_aux_loss_coef * output.aux_loss
    return loss, penalty
