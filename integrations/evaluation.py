"""What a fine-tuned model is measured by, beside its refusals."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorForSeq2Seq

from ..evals.drift import drift_statistics
from ..safety_tokens import SafetyTokens
from .chat_data import render_prompts
from .hf_models import evaluation_mode
from .loss_paths import HeadPath
from .peft_adapters import adapters_off, is_peft_model
from .references import read_safety_logits

_BATCH = 32


def held_out_loss(model: Any, tokenizer: Any, rows: Sequence[dict[str, list[int]]]) -> float:
    """Return the mean cross-entropy of all labels in `rows`, nats per token."""
    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    total = count = 0.0
    with torch.inference_mode(), evaluation_mode(model):
        for start in range(0, len(rows), _BATCH):
            batch = collate(list(rows[start : start + _BATCH])).to(model.device)
            labels = int((batch["labels"][:, 1:] != -100).sum())
            total += float(model(**batch).loss) * labels
            count += labels
    return total / max(count, 1.0)


def drift_at_answer_start(
    model: Any, tokenizer: Any, tokens: SafetyTokens, prompts: Sequence[str]
) -> dict[str, float] | None:
    """Measure how far the safety logits moved where an answer to each prompt begins.

    Args:
        model: a PeftModel; its reference is itself with the adapters off.
        tokenizer: with a chat template.
        tokens: whose logits to look at.
        prompts: the questions.

    Returns:
        rms, mean_abs and max_abs over prompts and tokens, logits; None for a model without
        adapters, which has not moved.
    """
    if not is_peft_model(model):
        return None
    found = drift_statistics(_pairs(model, tokenizer, tokens, prompts))
    return {"rms": found.rms, "mean_abs": found.mean_abs, "max_abs": found.max_abs}


def _pairs(
    model: Any, tokenizer: Any, tokens: SafetyTokens, prompts: Sequence[str]
) -> Iterator[tuple[Tensor, Tensor]]:
    inner = model.get_base_model()
    ids = tokens.ids_on(model.device)
    path = HeadPath(inner)
    path.open()
    with contextlib.closing(path):
        for start in range(0, len(prompts), _BATCH):
            batch = tokenizer(
                render_prompts(tokenizer, prompts[start : start + _BATCH]),
                return_tensors="pt",
                padding=True,
                padding_side="left",  # so that every prompt's last position is the last
                add_special_tokens=False,
            ).to(model.device)
            inputs = {**batch, "position_ids": _position_ids(batch["attention_mask"])}
            inputs["use_cache"] = False  # it would be thrown away
            now = read_safety_logits(inner, inner.forward, path, ids, inputs)
            with adapters_off(model):
                before = read_safety_logits(inner, inner.forward, path, ids, inputs)
            yield now[:, -1], before[:, -1]


def _position_ids(attention_mask: Tensor) -> Tensor:
    position_ids: Tensor = attention_mask.cumsum(dim=1).sub(1).clamp(min=0)
    return position_ids
