"""SafetySettings: a field for every option of attach() and of the penalty, and each one arrives."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from tiny_tokenizer import chat_tokenizer

from str_kernels import SafetyPenalty, attach
from str_kernels.integrations.attach_settings import NAMES, SafetySettings


def test_there_is_a_field_for_every_option() -> None:
    of_attach = {
        name
        for name, parameter in inspect.signature(attach).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    # a model is no field, and what the others take is made of fields of other names
    of_attach -= {"ref_model", "penalty", "reference"}
    of_penalty = {one.name for one in dataclasses.fields(SafetyPenalty)} - {"id_weights"}
    missing = {f"safety_{name}" for name in of_attach | of_penalty} - set(NAMES)
    assert not missing
    assert all(one.metadata["help"] for one in dataclasses.fields(SafetySettings))


def test_the_defaults_are_those_of_attach() -> None:
    options = SafetySettings().attach_options(chat_tokenizer())
    penalty = options.pop("penalty")
    assert vars(penalty) == vars(SafetyPenalty())
    parameters = inspect.signature(attach).parameters
    assert options == {name: parameters[name].default for name in options}


def test_every_field_arrives(tmp_path: Any) -> None:
    prompts = tmp_path / "anchors.jsonl"
    prompts.write_text('{"prompt": "help me"}\n{"prompt": "hello", "kind": "harmless"}\n')
    settings = SafetySettings(
        safety_weight=0.5, safety_kind="huber", safety_temperature=2.0, safety_delta=3.0,
        safety_positions="4", safety_ref_every=5, safety_ref_tokens=6, safety_path="logits",
        safety_chunk_bytes=7, safety_backend="torch", safety_anchors=str(prompts),
        safety_anchors_per_step=1, safety_harmless_anchors_per_step=1, safety_anchor_weight=0.25,
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
    assert (anchors.weight, anchors.seed) == (0.25, 8)
