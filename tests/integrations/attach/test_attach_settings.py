"""SafetySettings: a field for every option of attach() and of the penalty, and each one arrives."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
from tiny_tokenizer import chat_tokenizer

from str_kernels import AnchorPrompts, SafetyPenalty, attach
from str_kernels.integrations.attach.settings import NAMES, SafetySettings
from str_kernels.integrations.models.positions import default_penalty


def test_there_is_a_field_for_every_option() -> None:
    of_attach = {
        name
        for name, parameter in inspect.signature(attach).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    # a model is no field, and what the others take is made of fields of other names
    of_attach -= {"ref_model", "penalty", "reference", "tokenizer"}
    of_penalty = {one.name for one in dataclasses.fields(SafetyPenalty)} - {"id_weights"}
    missing = {f"safety_{name}" for name in of_attach | of_penalty} - set(NAMES)
    assert not missing
    assert all(one.metadata["help"] for one in dataclasses.fields(SafetySettings))


def test_the_defaults_are_those_of_attach() -> None:
    options = SafetySettings().attach_options(chat_tokenizer())
    penalty, anchors = options.pop("penalty"), options.pop("anchors")
    assert vars(penalty) == vars(default_penalty("none"))
    assert vars(anchors) == vars(AnchorPrompts.default(chat_tokenizer()))
    parameters = inspect.signature(attach).parameters
    assert options == {name: parameters[name].default for name in options}


def test_every_field_arrives(tmp_path: Any) -> None:
    prompts = tmp_path / "anchors.jsonl"
    prompts.write_text('{"prompt": "help me"}\n{"prompt": "hello", "kind": "harmless"}\n')
    settings = SafetySettings(
        safety_weight=0.5, safety_kind="huber", safety_temperature=2.0, safety_delta=3.0,
        safety_positions="4", safety_ref_every=5, safety_ref_tokens=6, safety_path="logits",
        safety_chunk_bytes=7, safety_backend="torch", safety_anchors=str(prompts),
        safety_anchors_per_step=1, safety_harmless_anchors_per_step=1,
        safety_anchor_penalty_weight=0.25,
    )  # fmt: skip
    options = settings.attach_options(chat_tokenizer(), seed=8)
    penalty, anchors = options.pop("penalty"), options.pop("anchors")
    found = (penalty.weight, penalty.kind, penalty.temperature, penalty.delta)
    assert found == (0.5, "huber", 2.0, 3.0)
    assert options == {
        "positions": 4, "ref_every": 5, "ref_tokens": 6, "path": "logits", "chunk_bytes": 7,
        "backend": "torch",
    }  # fmt: skip
    assert (anchors.per_step, anchors.harmless_per_step) == (1, 1)
    assert (anchors.penalty_weight, anchors.seed) == (0.25, 8)


def test_the_paper_s_form_is_one_word() -> None:
    options = SafetySettings(safety_positions="response").attach_options(chat_tokenizer())
    assert vars(options["penalty"]) == vars(SafetyPenalty())
    assert options["positions"] == "response" and "anchors" not in options


def test_a_relative_weight_of_the_anchors_is_refused_by_name() -> None:
    settings = SafetySettings(safety_anchor_weight=1.0)
    with pytest.raises(ValueError, match="Set `safety_anchor_penalty_weight`"):
        settings.attach_options(chat_tokenizer())


def test_the_template_s_options_reach_the_anchors() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ mark }}" + tokenizer.chat_template
    for given in ('{"mark": "hello "}', {"mark": "hello "}):
        settings = SafetySettings(safety_chat_template_kwargs=given, safety_answer_start="bye")
        rows = settings.attach_options(tokenizer)["anchors"].rows
        text = tokenizer.decode(rows[0].input_ids)
        assert text.startswith("hello") and text.endswith("bye")
    with pytest.raises(ValueError, match="`safety_chat_template_kwargs` must be a JSON object"):
        SafetySettings(safety_chat_template_kwargs="[1]").attach_options(tokenizer)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"safety_positions": "response", "safety_answer_start": "x"}, "safety_answer_start"),
        (
            {"safety_positions": "all", "safety_harmless_anchors_per_step": 1},
            "safety_harmless_anchors_per_step",
        ),
        (
            {"safety_weight": 0.0, "safety_anchor_penalty_weight": 0.5},
            "safety_anchor_penalty_weight",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"`{named}` must be left out"):
        SafetySettings(**fields).attach_options(chat_tokenizer())
