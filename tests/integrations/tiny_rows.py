"""Rows of ids without a tokenizer, and a SafetyTrainer that has trained on them."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import VOCAB, fresh_lora, tiny_model
from torch.utils.data import Dataset
from transformers import TrainingArguments

from str_kernels import SafetyPenalty, SafetyTokens
from str_kernels.integrations.trainers.hf_trainer import SafetyTrainer

TOKENS = SafetyTokens(ids=[5, 9, 77])


class Rows(Dataset):
    """Rows of uneven length, so that micro-batches have different label counts."""

    def __init__(self, seed, count):
        generator = torch.Generator().manual_seed(seed)
        self.rows = []
        for _ in range(count):
            length = int(torch.randint(5, 14, (), generator=generator))
            ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
            self.rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return dict(self.rows[i])


class Padding:
    """What the collator asks of a tokenizer, for rows that are ids already."""

    padding_side = "right"
    deprecation_warnings: dict[str, bool] = {}  # noqa: RUF012 - transformers writes into it

    def pad(self, features, **_):
        longest = max(len(f["input_ids"]) for f in features)
        ids = [f["input_ids"] + [0] * (longest - len(f["input_ids"])) for f in features]
        mask = [[1] * len(f["input_ids"]) + [0] * (longest - len(f["input_ids"])) for f in features]
        labels = [f["labels"] for f in features]
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor(mask),
            "labels": torch.tensor([row + [-100] * (longest - len(row)) for row in labels]),
        }


def arguments_of(folder: Any, **options: Any) -> TrainingArguments:
    """Each step is logged, to nobody, and nothing is saved."""
    quiet: dict[str, Any] = {
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "dataloader_pin_memory": False, "remove_unused_columns": False,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**quiet, **options})


def trainer_of(model: Any, arguments: Any, rows: Any = None, **options: Any) -> SafetyTrainer:
    """Make a trainer of the penalty on the rows, for rows of ids."""
    defaults = {
        "safety_tokens": TOKENS,
        "penalty": SafetyPenalty(0.3),
        "positions": "response",
        "data_collator": lambda rows: Padding().pad(rows),
    }
    return SafetyTrainer(model, arguments, train_dataset=rows, **{**defaults, **options})


def log_of(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def trained(seed, folder, batch_size, accumulation, steps=3, **options):
    model = fresh_lora(tiny_model("llama", seed), init_lora_weights="gaussian")
    arguments = arguments_of(
        folder,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        seed=11,
        **options,
    )
    trainer = trainer_of(model, arguments, Rows(seed, 64))
    trainer.train()
    return trainer, log_of(trainer)
