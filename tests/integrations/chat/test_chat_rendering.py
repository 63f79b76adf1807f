"""Where an answer begins, on every chat template in TRL's package, and nothing left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import chat_tokenizer

from str_kernels import AnchorPrompts
from str_kernels.integrations.chat.rendering import render, render_answer_starts, render_prompts
from str_kernels.integrations.chat.rows import Example, encode_examples

trl = pytest.importorskip("trl")  # the oldest releases of the matrix are tested without it
TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
}
# What leads from the generation prompt to the answer; of all others it is nothing.
BETWEEN = {
    "glm4moe": "\n<think></think>\n",
    "gptoss": "<|channel|>final<|message|>",
    "muse_glimmer": " to=user<|message|>",
    "qwen3": "<think>\n\n</think>\n\n",
    "qwen3_5_think": "\n</think>\n\n",
    "qwen3_6": "\n</think>\n\n",
    "qwen3_8": "\n</think>\n\n",
}
REFUSED = ("deepseek_r1_distill", "deepseekv3")  # a finished answer has no thought, open or closed
THINK_AT_ONCE = ("nemotron_3",)  # "<think></think>", where the prompt has "<think>\n"
QUESTION = "How do I get rid of a wasp's nest?"


def with_template(template: str) -> Any:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template
    tokenizer.bos_token = tokenizer.eos_token  # which some templates begin with
    return tokenizer


def family(name: str) -> str:
    return name.removesuffix("_training")


@pytest.mark.parametrize("name", TEMPLATES)
def test_where_the_answer_begins(name: str) -> None:
    tokenizer = with_template(TEMPLATES[name])
    (asked,) = render_prompts(tokenizer, [QUESTION])
    assert QUESTION in asked
    if family(name) in REFUSED:
        with pytest.raises(ValueError, match=r"opens '<think>\\n'.*`chat_template_kwargs`"):
            render_answer_starts(tokenizer, [QUESTION])
        (start,) = render_answer_starts(tokenizer, [QUESTION], answer_start="</think>\n\n")
        assert start == asked + "</think>\n\n"
        return
    (start,) = render_answer_starts(tokenizer, [QUESTION])
    if name.startswith(THINK_AT_ONCE):
        assert start == asked.removesuffix("\n") + "</think>"
    else:
        assert start == asked + BETWEEN.get(family(name), "")
    # and what follows there, in a whole conversation, is the answer
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "Call them."}]
    after = render(tokenizer, turns).removeprefix(start)
    assert after.lstrip(" ").startswith("Call them.")


def test_the_template_s_own_options() -> None:
    tokenizer = with_template(TEMPLATES["qwen3"])
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    (start,) = render_answer_starts(tokenizer, [QUESTION], **options)
    assert start.endswith("assistant\n<think>\n\n</think>\n\n")
    assert start == render_answer_starts(tokenizer, [QUESTION])[0]
    anchors = AnchorPrompts.from_prompts(tokenizer, [QUESTION], per_step=1, **options)
    tail = tokenizer.encode(start, add_special_tokens=False)
    assert list(anchors.rows[0].input_ids) == tail


@pytest.mark.parametrize("name", ["smolvlm", "idefics3", "llava_next"])
def test_a_template_of_parts_gets_parts(name: str) -> None:
    """A plain string is rendered as nothing by these."""
    tokenizer = with_template(TEMPLATES[name])
    (row,) = encode_examples(tokenizer, [Example.chat("help me", "sorry")], 512)
    assert any(label != -100 for label in row["labels"])
    text = render(tokenizer, Example.chat("help me", "sorry").messages or ())
    assert text.index("help me") < text.index("sorry")


def test_a_template_that_leaves_something_out_is_refused() -> None:
    silent = with_template("{% for m in messages %}<{{ m.role }}>{% endfor %}")
    with pytest.raises(ValueError, match="its chat template leaves out the content of the user"):
        render_answer_starts(silent, [QUESTION])
    with pytest.raises(ValueError, match="its chat template raises: no users"):
        render_prompts(with_template("{{ raise_exception('no users') }}"), [QUESTION])
    with pytest.raises(ValueError, match="must have a chat template"):
        render_prompts(with_template(""), [QUESTION])
