"""Each measure against a plain loop, one token at a time, on tiny models."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tokenizer import chat_tokenizer, save_tiny_model
from transformers import AutoModelForCausalLM

from str_kernels import SafetyTokens
from str_kernels.evals.drift import DriftStatistics
from str_kernels.integrations.chat.rendering import render_prompts
from str_kernels.integrations.chat.rows import Example
from str_kernels.integrations.evaluation.measures import (
    combine_drift,
    drift_by_position,
    is_exact_match,
    question_and_answer,
    text_perplexity,
)

PROMPTS = ["what is 1 + 2", "hello", "I can not help with that .", "good day"]


def model_of(folder: Path, seed: int, end: int | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(folder / str(seed), seed))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    if end is not None:
        model.generation_config.eos_token_id = end
    return model


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        (" The answer\n is 7 ", "The answer is 7.", True),
        ("the answer is 7.", "The answer is 7.", False),
        ("7..", "7.", False),
        ("7 .", "7", True),
        ("", "7", False),
    ],
)
def test_exact_match(answer: str, expected: str, same: bool) -> None:
    assert is_exact_match(answer, expected) is same


def test_question_and_answer_of_each_kind_of_row() -> None:
    turns = [("user", "hello"), ("assistant", "good day"), ("user", "thanks"), ("assistant", "bye")]
    chat = Example(messages=tuple({"role": role, "content": text} for role, text in turns))
    question, answer = question_and_answer(chat_tokenizer(), chat)
    assert question == "<user> hello <end> <assistant> good day <end> <user> thanks <end> " + (
        "<assistant> "
    )
    assert answer == "bye"
    plain = Example(prompt="what is 1", completion=" 1")
    assert question_and_answer(chat_tokenizer(), plain) == ("what is 1", " 1")


@pytest.mark.parametrize(
    ("length", "stride"), [(4, 1), (4, 2), (4, 3), (5, None), (64, None), (22, 1), (21, 1)]
)
def test_perplexity_against_a_loop_over_tokens(
    length: int, stride: int | None, tmp_path: Path
) -> None:
    model, tokenizer = model_of(tmp_path, 1), chat_tokenizer()
    text = "hello what is 1 + 2 - 3 = 4 thanks bye sorry , but I can not help with that ."
    ids = tokenizer.encode(text)
    step = length // 2 if stride is None else stride
    expected = 0.0
    for i in range(1, len(ids)):
        start = 0
        while start + length <= i:  # the first window that holds token i
            start += step
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[start:i]])).logits[0, -1]
        expected -= logits.log_softmax(-1)[ids[i]].item()
    seen: list[tuple[int, int]] = []
    found = text_perplexity(
        model,
        tokenizer,
        text,
        max_length=length,
        stride=stride,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert found.tokens == len(ids) - 1 == 21
    assert found.nats == pytest.approx(expected / 21, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(expected / 21), rel=1e-4)
    assert seen[-1][0] == seen[-1][1] == len(seen)


def test_perplexity_refuses(tmp_path: Path) -> None:
    model, tokenizer = model_of(tmp_path, 1), chat_tokenizer()
    for options, message in (
        ({"max_length": 1}, "`max_length` must be >= 2; got 1"),
        ({"max_length": 4, "stride": 4}, r"`stride` must be in \[1, 3\]; got 4"),
        ({}, "`text` must have at least 2 tokens; got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            text_perplexity(model, tokenizer, "hello", **options)


def by_hand(
    model: Any, reference: Any, tokens: SafetyTokens, positions: int, end: int
) -> list[list[float]]:
    """Ask one prompt at a time, one token at a time."""
    tokenizer, found = chat_tokenizer(), [[] for _ in range(positions)]
    for text in render_prompts(tokenizer, PROMPTS):
        ids = tokenizer.encode(text, add_special_tokens=False)
        for place in range(positions):
            given = torch.tensor([ids])
            with torch.no_grad():
                now = model(input_ids=given).logits[0, -1]
                before = reference(input_ids=given).logits[0, -1]
            found[place] += (now - before)[tokens.ids].abs().tolist()
            ids.append(int(before.argmax()))
            if ids[-1] in (end, tokenizer.eos_token_id):
                break
    return found


def test_drift_by_position_against_a_loop(tmp_path: Path) -> None:
    tokens = SafetyTokens(ids=[10, 11, 13, 5])
    model, reference = model_of(tmp_path, 1), model_of(tmp_path, 2)
    tokenizer = chat_tokenizer()
    # an end that some of the reference's answers reach early and others do not
    _, first = _greedy(reference, tokenizer)
    end = first
    reference.generation_config.eos_token_id = end
    expected = by_hand(model, reference, tokens, 5, end)
    found = drift_by_position(model, tokenizer, tokens, PROMPTS, 5, ref_model=reference)
    check(found, expected, len(tokens))
    assert found[0].rows == 4 and found[-1].rows < 4, "no answer ended early: the test is empty"
    halves = [
        drift_by_position(model, tokenizer, tokens, part, 5, ref_model=reference)
        for part in (PROMPTS[:1], PROMPTS[1:])
    ]
    check(combine_drift(halves), expected, len(tokens))


def _greedy(reference: Any, tokenizer: Any) -> tuple[str, int]:
    """Return a prompt and the second token of the reference's answer to it."""
    ids = tokenizer.encode(render_prompts(tokenizer, PROMPTS)[0], add_special_tokens=False)
    for _ in range(2):
        with torch.no_grad():
            ids.append(int(reference(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return PROMPTS[0], ids[-1]


def check(found: list[DriftStatistics], expected: list[list[float]], ids: int) -> None:
    expected = [values for values in expected if values]
    assert len(found) == len(expected)
    for one, values in zip(found, expected, strict=True):
        assert one.rows * ids == len(values)
        assert one.rms == pytest.approx(math.sqrt(sum(v * v for v in values) / len(values)), 1e-4)
        assert one.mean_abs == pytest.approx(sum(values) / len(values), 1e-4)
        assert one.max_abs == pytest.approx(max(values), 1e-4)


def test_drift_of_a_model_with_adapters_is_against_them_off(tmp_path: Path) -> None:
    from tiny_models import with_lora

    tokens = SafetyTokens(ids=[10, 11, 13, 5])
    reference = model_of(tmp_path, 1)
    # a copy: transformers 5.0 makes another model of the second load
    peft_model = with_lora(copy.deepcopy(reference), 3)
    found = drift_by_position(peft_model, chat_tokenizer(), tokens, PROMPTS, 3)
    check(found, by_hand(peft_model, reference, tokens, 3, end=1), len(tokens))
    assert found[0].rms > 0.01
    for model, message in ((reference, "`ref_model` must be given"),):
        with pytest.raises(ValueError, match=message):
            drift_by_position(model, chat_tokenizer(), tokens, PROMPTS, 3)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_nan_of_any_batch_is_in_what_is_combined(place: int) -> None:
    parts = [[DriftStatistics(2, 1.0, 1.0, 1.0)] for _ in range(3)]
    parts[place] = [DriftStatistics(1, math.nan, math.nan, math.nan)]
    (found,) = combine_drift(parts)
    assert math.isnan(found.max_abs) and math.isnan(found.rms) and math.isnan(found.mean_abs)
