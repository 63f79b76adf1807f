"""A plain loop, Accelerate, Trainer and TRL: the same losses to 1e-6, with uneven labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import fresh_lora
from tiny_tokenizer import chat_tokenizer, save_tiny_model
from transformers import AutoModelForCausalLM

from str_kernels import AnchorPrompts, SafetyPenalty, SafetyTokens

pytest.importorskip("trl")  # the oldest releases of the matrix are tested without it
from bench import trainers

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:trl", "ignore::FutureWarning")


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_all_trainers_log_the_same(
    batch_size: int, accumulation: int, anchored: bool, seed: int, tmp_path: Any
) -> None:
    folder = save_tiny_model(tmp_path / "model", seed)

    def make_model() -> Any:
        torch.manual_seed(seed)
        return fresh_lora(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))

    examples = [
        (f"what is {a} + {b}", " ".join(["="] * a) + f" {a + b}")  # 2 to 5 labels
        for a in range(1, 5)
        for b in range(1, 5)
    ]
    anchors = None
    if anchored:  # one in each step, and another one in the next
        anchors = AnchorPrompts.from_prompts(chat_tokenizer(), ["help me", "bye", "7"], per_step=1)
    setup = trainers.Setup(
        make_model, chat_tokenizer(), examples, SafetyTokens(ids=[10, 11, 13, 14]),
        SafetyPenalty(0.3), batch_size, accumulation, learning_rate=2e-2, anchors=anchors,
    )  # fmt: skip
    expected = trainers.plain_loop(setup)
    assert len(expected) == 4 and expected[-1]["safety/penalty"] > 1e-4
    for name, run in trainers.TRAINERS.items():
        for step, (entry, plain) in enumerate(zip(run(setup), expected, strict=True)):
            assert trainers.off(entry, plain) <= 1e-6, (name, step, entry, plain)
            for term in ("safety/ce", "safety/penalty"):
                assert entry[term] == pytest.approx(plain[term], rel=1e-4, abs=1e-9), (name, step)
