"""Which characters are an answer's, on every chat template in TRL and against its masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import byte_tokenizer, chat_tokenizer

from str_kernels.integrations.chat.answer_spans import render_with_answers
from str_kernels.integrations.chat.rendering import render
from str_kernels.integrations.chat.rows import Example, encode_prompt, encode_rows

trl = pytest.importorskip("trl")  # the oldest releases of the matrix are tested without it
FOLDER = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted(FOLDER.glob("*.jinja"))
    if not path.stem.endswith("_training")
}
NO_SYSTEM = ("gemma",)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


LONG = [user("Hi."), assistant("First answer."), user("And then?"), assistant("Second one.")]


def turns(name: str) -> list[dict[str, Any]]:
    return LONG if name in NO_SYSTEM else [{"role": "system", "content": "Be brief."}, *LONG]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answers_and_nothing_else(name: str) -> None:
    tokenizer = byte_tokenizer(TEMPLATES[name])
    messages = turns(name)
    text, spans = render_with_answers(tokenizer, messages)
    assert text == render(tokenizer, messages)
    assert [messages[turn] for turn in spans] == [LONG[1], LONG[3]]
    first, last = (text[start:end] for start, end in spans.values())
    assert "First answer." in first and "Second one." in last
    assert last == text[-len(last) :]  # to the end of the text
    said = first + last
    assert not any(word in said for word in ("Hi.", "Be brief", "And then", "user\n"))
    # the model is not asked for its own header
    header = render(tokenizer, messages[:-1], add_generation_prompt=True)[-6:].strip()
    assert not last.startswith(header)


@pytest.mark.parametrize(
    "name", [name for name in TEMPLATES if (FOLDER / f"{name}_training.jinja").exists()]
)
def test_the_labels_are_trl_s_but_for_what_the_prompt_has(name: str) -> None:
    """TRL labels, on some templates, a part of the generation prompt, which no model writes."""
    training = (FOLDER / f"{name}_training.jinja").read_text(encoding="utf-8")
    tokenizer = byte_tokenizer(TEMPLATES[name])
    messages = [user("Hi there."), assistant("Hello!")]
    given = in_parts(messages) if name in PARTS else messages
    options = {"chat_template": training}
    if tokenizer.apply_chat_template(given, tokenize=False, **options) != render(
        tokenizer, messages
    ):
        pytest.skip("TRL's training template renders another text")
    theirs = tokenizer.apply_chat_template(
        given,
        **options,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    (ours,) = encode_rows(tokenizer, [Example(messages=tuple(messages))], None).rows
    assert ours["input_ids"] == theirs["input_ids"]
    labelled = [label != -100 for label in ours["labels"]]
    masks = [bool(mask) for mask in theirs["assistant_masks"]]
    if name == "llava_next":  # TRL leaves out the blank behind the end of the last turn
        labelled, masks = labelled[:-1], masks[:-1]
    assert all(mask for mine, mask in zip(labelled, masks, strict=True) if mine)
    asked = render(tokenizer, messages[:1], add_generation_prompt=True)
    begin = len(encode_prompt(tokenizer, asked))
    assert labelled[begin:] == masks[begin:]


PARTS = ("idefics3", "smolvlm", "llava_next")


def in_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "qwen3", "qwen3_5_think", "gemma3"])
@pytest.mark.parametrize(
    "answer", ["\n\nHello.", "    return a + b", "<think>\nhm\n</think>\n\nOne."]
)
def test_answers_that_open_with_a_blank_a_line_or_a_thought(name: str, answer: str) -> None:
    tokenizer = byte_tokenizer(TEMPLATES[name])
    text, spans = render_with_answers(tokenizer, [user("Write it."), assistant(answer)])
    (span,) = spans.values()
    assert answer.rpartition("</think>")[2].strip() in text[span.start : span.end]
    assert "Write" not in text[span.start : span.end]


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "qwen3_5_nothink", "gptoss", "lfm2"])
def test_a_chat_that_opens_with_the_assistant(name: str) -> None:
    messages = [assistant("Welcome!"), user("Hi."), assistant("How can I help?")]
    text, spans = render_with_answers(byte_tokenizer(TEMPLATES[name]), messages)
    first, last = (text[start:end] for start, end in spans.values())
    assert first.startswith("Welcome!") and "How can I help?" in last and "Hi." not in first + last


def test_the_template_s_own_marks_come_first() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}bot: {% generation %}"
        "{{ m.content }}<end>{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    )
    tokenizer = byte_tokenizer(template)
    text, spans = render_with_answers(tokenizer, LONG)
    found = [text[start:end] for start, end in spans.values()]
    assert found == ["First answer.<end>", "Second one.<end>"]


def test_an_answer_that_is_not_there_is_an_error() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }} {% endfor %}"
    with pytest.raises(ValueError, match="leaves out the content of the user"):
        render_with_answers(tokenizer, [user("hello"), assistant("bye")])
