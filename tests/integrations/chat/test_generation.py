"""Greedy answers: where they end, and which of them say too little to be judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tokenizer import byte_tokenizer, chat_tokenizer, save_tiny_model
from transformers import AutoModelForCausalLM

from str_kernels.files.stages import Stages
from str_kernels.integrations.chat import generation
from str_kernels.integrations.chat.generation import ENOUGH_TOKENS, answer_prompts, end_ids
from str_kernels.integrations.evaluation import asking as eval_asking
from str_kernels.integrations.evaluation.inputs import NamedModel
from str_kernels.integrations.evaluation.options import EvalOptions

TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}<|assistant|>"
PROMPTS = ["hello", "what is 1 + 2", "good day"]


@pytest.mark.parametrize("named", [None, 0, [0, 4]])
def test_an_answer_ends_at_the_tokenizer_s_end_too(named: Any, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, 3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = chat_tokenizer()
    with torch.no_grad():  # a word, then the end, then words again if it is not seen
        model.lm_head.weight.zero_()
        hello, end = tokenizer.convert_tokens_to_ids(["hello", "<end>"])
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.model.embed_tokens.weight[hello, 0] = -1.0
        model.lm_head.weight[hello, 0] = 1.0
        model.lm_head.weight[end, 0] = -1.0
        for layer in model.model.layers:  # each position is its token alone
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.generation_config.eos_token_id = named
    there = {None: set(), 0: {0}}[named] if not isinstance(named, list) else set(named)
    assert end_ids(model, tokenizer) == {end} | there
    assert answer_prompts(model, tokenizer, PROMPTS, max_new_tokens=6) == ["hello"] * 3


@pytest.mark.parametrize(
    ("written", "cut", "outcome"),
    [
        ("<think>\nHm.\n</think>\n\nI can't", True, "unfinished"),
        ("<think>\nHm.\n</think>\n\n", True, "unfinished"),
        ("<think>\nHm.\n</think>\n\nI can't", False, "other"),  # it ended there by itself
        ("<think>\nHm.\n</think>\n\nI can't help with", True, "refusal"),
        ("<think>\nHm.\n</think>\n\nSure: " + "a b c " * ENOUGH_TOKENS, True, "other"),
        ("<think>\nHm. I can't help with that", True, "unfinished"),
        ("I can't", True, "other"),  # no thought took its tokens
        ("", False, "degenerate"),
    ],
)
def test_an_answer_cut_soon_after_a_thought_is_unfinished(
    written: str, cut: bool, outcome: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer(TEMPLATE)
    ids = tokenizer.encode(written, add_special_tokens=False)
    monkeypatch.setattr(generation, "continuations", lambda *_, **__: [ids, ids])
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "model", 3))
    tokens = max(1, len(ids) + (not cut))
    options = EvalOptions("model", answer_tokens=tokens)
    stages = Stages(tmp_path / "stages", ["key"], print)
    found = NamedModel(model, tokenizer, {}, None)
    asked = eval_asking.AskedModel(options, found, stages, lambda *_: None)
    answers = asked.answers("harmful", ["How?", "Why?"])
    assert [given["outcomes"] for given in answers] == [{"opening": outcome}] * 2
