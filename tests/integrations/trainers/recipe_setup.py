"""One LoRA run for all recipes: uneven labels, a last step that is shorter, plain SGD.

SGD, since Adam would make the same steps of a loss that is wrong by a factor.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny_models import with_lora
from tiny_tokenizer import chat_tokenizer, save_tiny_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, TrainingArguments

from str_kernels import AnchorPrompts, SafetyPenalty, SafetyTokens, attach
from str_kernels.integrations.chat.rows import Example, encode_examples

BATCH_SIZE, LEARNING_RATE = 2, 0.5
SUMS = [
    (f"what is {a} + {b}", " ".join(["="] * a) + f" {a + b}")  # 2 to 5 labels
    for a in range(1, 5)
    for b in range(1, 5)
]
TURNS = SUMS[:14]  # 7 micro-batches: the last step has one of two, or of three
BOUND = 1e-6  # of float32 losses whose sums differ in order only


class Recipe(NamedTuple):
    make_model: Callable[[], Any]
    tokenizer: Any
    rows: list[dict[str, list[int]]]
    collator: Any
    options: dict[str, Any]
    accumulation: int

    def loader(self) -> Any:
        return DataLoader(self.rows, BATCH_SIZE, collate_fn=self.collator)  # type: ignore[arg-type]

    def arguments(self, folder: Path) -> dict[str, Any]:
        """What makes transformers' Trainer take the same steps."""
        if "train_sampling_strategy" not in TrainingArguments.__dataclass_fields__:
            pytest.skip("this release of transformers cannot be told to keep the rows' order")
        return {
            "output_dir": str(folder),
            "num_train_epochs": 1,
            "per_device_train_batch_size": BATCH_SIZE,
            "gradient_accumulation_steps": self.accumulation,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "max_grad_norm": 0.0,  # no clipping
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 0,  # of the anchors' order
        }


class Step(NamedTuple):
    loss: float
    ce: float
    penalty: float
    anchor_penalty: float


def make_recipe(folder: Path, seed: int, accumulation: int, anchored: bool = False) -> Recipe:
    tokenizer = chat_tokenizer()
    saved = save_tiny_model(folder / "model", seed)
    options: dict[str, Any] = {"tokenizer": tokenizer}  # the penalty at the package's anchors alone
    if anchored:  # and on the rows
        anchors = AnchorPrompts.from_prompts(tokenizer, ["help me", "bye", "7"], per_step=1)
        options = {"penalty": SafetyPenalty(0.1), "anchors": anchors, "positions": "response"}

    def make_model() -> Any:
        torch.manual_seed(seed)
        return with_lora(AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32), seed)

    return Recipe(
        make_model,
        tokenizer,
        encode_examples(tokenizer, [Example.chat(*turn) for turn in TURNS], 256),
        DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        options,
        accumulation,
    )


def make_optimizer(parameters: Any) -> torch.optim.Optimizer:
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return torch.optim.SGD(trained, lr=LEARNING_RATE)


def expected_steps(recipe: Recipe) -> list[Step]:
    """The steps by hand: sums of the terms of each micro-batch over the labels of the step."""
    model = recipe.make_model().train()
    optimizer = make_optimizer(model.parameters())
    batches, steps = list(recipe.loader()), []
    tokens = SafetyTokens.from_templates(recipe.tokenizer)
    with attach(model, tokens, **recipe.options) as handle:
        for start in range(0, len(batches), recipe.accumulation):
            window = batches[start : start + recipe.accumulation]
            counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in window]
            sums = [0.0, 0.0, 0.0, 0.0]
            for batch, count in zip(window, counts, strict=True):
                share = count / sum(counts)  # of the mean that the forward makes
                loss = model(**batch).loss * share
                loss.backward()
                found = (handle.last.ce, handle.last.penalty, handle.last_anchors.penalty)
                for i, value in enumerate((loss.detach(), *(term * share for term in found))):
                    sums[i] += float(value)
            optimizer.step()
            optimizer.zero_grad()
            steps.append(Step(*sums))
    assert len({len(row["input_ids"]) for row in recipe.rows}) > 1 and max(steps[-1][2:]) > 1e-5
    return steps


def assert_same_logs(trainer: Any, recipe: Recipe) -> None:
    """Compare what a trainer logged with the steps by hand."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, step in zip(entries, expected_steps(recipe), strict=True):
        assert entry["loss"] == pytest.approx(step.loss, rel=BOUND)
        assert entry["safety/ce"] == pytest.approx(step.ce, rel=BOUND)
        # a difference of logits has fewer digits than they have
        assert entry["safety/penalty"] == pytest.approx(step.penalty, rel=1e-4)
        assert entry["safety/anchor_penalty"] == pytest.approx(step.anchor_penalty, rel=1e-4)
