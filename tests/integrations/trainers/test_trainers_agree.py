"""A plain loop, Accelerate, Trainer and TRL: the same losses to 1e-6, with uneven labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recipe_setup import SUMS
from tiny_models import fresh_lora, with_lora
from tiny_tokenizer import chat_tokenizer, save_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from str_kernels import AnchorPrompts, SafetyPenalty, SafetyTokens

pytest.importorskip("trl")  # the oldest releases of the matrix are tested without it
from bench.steps import trainers

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

    anchors = None
    if anchored:  # one in each step, and another one in the next
        anchors = AnchorPrompts.from_prompts(chat_tokenizer(), ["help me", "bye", "7"], per_step=1)
    setup = trainers.Setup(
        make_model, chat_tokenizer(), SUMS, SafetyTokens(ids=[10, 11, 13, 14]),
        SafetyPenalty(0.3), batch_size, accumulation, learning_rate=2e-2, anchors=anchors,
    )  # fmt: skip
    expected = trainers.plain_loop(setup)
    assert len(expected) == 4 and expected[-1]["safety/penalty"] > 1e-4
    for name, run in trainers.TRAINERS.items():
        for step, (entry, plain) in enumerate(zip(run(setup), expected, strict=True)):
            assert trainers.off(entry, plain) <= 1e-6, (name, step, entry, plain)
            for term in ("safety/ce", "safety/penalty"):
                assert entry[term] == pytest.approx(plain[term], rel=1e-4, abs=1e-9), (name, step)


BOUNDS = {torch.float64: 1e-7, torch.float32: 64 * 2**-24}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("name", trainers.TRAINERS)
def test_accumulation_is_exact_in_every_trainer(
    name: str, anchored: bool, dtype: torch.dtype, seed: int, tmp_path: Any, monkeypatch: Any
) -> None:
    """8 rows are one batch, or 2 of 4, 4 of 2, 8 of 1: loss and gradient, before they are clipped.

    In float64 the gradient agrees to 1e-15, and to 1e-8 with anchors, whose share of a micro-step
    is a float32. In float32 sums in another order differ by roundings, 2^-24 of the largest entry
    each; 8 of them were the most seen. Trainer adds up the logged loss in float32 in any case.
    """
    grads: list[list[Tensor]] = []
    clip = torch.nn.utils.clip_grad_norm_  # which all of them call, Trainer through Accelerate

    def note_and_clip(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = list(parameters)
        grads.append([p.grad.clone() for p in parameters if p.grad is not None])
        return clip(parameters, *args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", note_and_clip)
    folder = save_tiny_model(tmp_path / "model", seed)

    def make_model() -> Any:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return with_lora(model, seed).to(dtype)  # which has moved: the penalty has a gradient

    examples = [(f"what is {n} + 1", " ".join(["="] * n) + " 7") for n in range(1, 9)]
    anchors = None
    if anchored:
        anchors = AnchorPrompts.from_prompts(chat_tokenizer(), ["help me", "bye", "7"], per_step=2)
    logs = []
    for batch_size in (8, 4, 2, 1):
        setup = trainers.Setup(
            make_model, chat_tokenizer(), examples, SafetyTokens(ids=[10, 11, 13, 14]),
            SafetyPenalty(0.3), batch_size, 8 // batch_size, anchors=anchors,
        )  # fmt: skip
        logs += trainers.TRAINERS[name](setup)
    assert len(logs) == len(grads) == 4 and logs[0]["safety/penalty"] > 1e-4
    for entry, found in zip(logs[1:], grads[1:], strict=True):
        for term in ("loss", "safety/ce", "safety/penalty"):
            assert entry[term] == pytest.approx(logs[0][term], rel=1e-6), term
        assert len(found) == len(grads[0]) == 8
        for one, whole in zip(found, grads[0], strict=True):
            off = float((one - whole).abs().max() / whole.abs().max())
            assert off <= BOUNDS[dtype]
