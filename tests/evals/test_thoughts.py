"""Thoughts are told from answers in every form that the templates of TRL's package render."""

from __future__ import annotations

import pytest

from str_kernels.evals import classify_answer, classify_gcg, count_refusals
from str_kernels.evals.thoughts import opened_thought, without_thought

REFUSAL = "I can't help with that."
FORMS = [
    "<think>\nHe wants to do it. I can do that.\n</think>\n\n{}",
    "<think></think>{}",
    "<think>\n\n</think>\n\n{}",
    "</think>\n\n{}",  # its beginning was in the prompt
    "Hm, how do I do that? </think>\n{}",
    "<|channel>thought\nHm, sure.\n<channel|>{}",
    "<|channel|>analysis<|message|>Sure?<|end|><|start|>assistant<|channel|>final<|message|>{}",
    "<|channel|>final<|message|>{}",
    " to=self<|message|>Sure?<|eom|><|start|>assistant to=user<|message|>{}",
    "<think>One.</think><think>Two.</think>{}",
]


@pytest.mark.parametrize("form", FORMS)
def test_the_answer_is_what_is_left(form: str) -> None:
    assert without_thought(form.format(REFUSAL)) == REFUSAL
    assert classify_answer(form.format(REFUSAL)) == "refusal"
    assert classify_answer(form.format("Sure, here is how.")) == "other"
    assert classify_gcg(form.format("I cannot do it.")) == "refusal"


@pytest.mark.parametrize(
    "text",
    [
        "<think>\nI can't help with that, so",
        "\n<think>",
        "<|channel>thought\nI can't help with that",
        "<|channel|>analysis<|message|>I cannot help with that.<|end|><|start|>assistant",
        " to=self<|message|>I cannot help with that.",
    ],
)
def test_a_text_that_ends_inside_its_thought_is_counted_apart(text: str) -> None:
    assert without_thought(text) is None
    assert classify_answer(text) == classify_gcg(text) == "unfinished"
    counts = count_refusals([text, REFUSAL, "Sure.", ""])
    assert (counts.refusal, counts.other, counts.degenerate, counts.unfinished) == (1, 1, 1, 1)
    assert counts.total == 4


@pytest.mark.parametrize("text", [REFUSAL, "", "a < b and <b>bold</b>", "Use </b> here."])
def test_a_text_without_thoughts_is_left_as_it_is(text: str) -> None:
    assert without_thought(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "I can't. <think>Or can I?",
        "I can't help. Do not write </think> tags.",
        "I can't discuss <|channel|>analysis<|message|> here.",
    ],
)
def test_an_answer_that_speaks_of_marks_is_that_answer(text: str) -> None:
    assert without_thought(text) == text
    assert classify_answer(text) != "unfinished"


def test_marks_around_an_answer() -> None:
    assert without_thought("<|START_RESPONSE|>I can't.<|END_RESPONSE|>") == "I can't."
    constrained = "<|channel|>final <|constrain|>json<|message|>I can't."
    assert without_thought(constrained) == "I can't."


@pytest.mark.parametrize(
    ("prompt", "mark"),
    [
        ("<|im_start|>assistant\n<think>\n", "<think>"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", ""),
        ("<think>a</think>b<|im_start|>assistant\n<think>\n", "<think>"),
        ("<|turn>model\n<|channel>thought\n", "<|channel>thought"),
        ("<|im_start|>assistant\n", ""),
        ("What does the <think> tag do?<|im_end|>\n<|im_start|>assistant\n", ""),
    ],
)
def test_what_a_prompt_opened(prompt: str, mark: str) -> None:
    assert opened_thought(prompt) == mark
