"""The built-in model's training step, which several benches time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from str_kernels.integrations.loading.builtin_model import builtin_model_folder

from .timing import Step


def lora_model(dtype: torch.dtype, targets: str | list[str] = "all-linear") -> Any:
    """Return the built-in model with LoRA of rank 8, by default on all linear layers but the head.

    Each call makes another: two that share weights would share their caches too.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar for each model loaded
    model = AutoModelForCausalLM.from_pretrained(builtin_model_folder(), dtype=dtype)
    lora = LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def adamw_step(model: Any, batch: Mapping[str, Tensor]) -> Step:
    """Return a step of AdamW on what is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()

    return step
