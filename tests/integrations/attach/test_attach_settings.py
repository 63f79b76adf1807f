"""The options of attach(), each written once: every face has each of them, and each one arrives."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
import torch
from tiny_models import fresh_lora, tiny_model
from tiny_tokenizer import chat_tokenizer

from str_kernels import AnchorPrompts, SafetyPenalty, SafetyTokens, attach
from str_kernels.attach_options import PlainOptions, SafetySettings, default_penalty
from str_kernels.integrations.attach import KEYWORDS, AttachOptions, hook, keywords_of, tokens_of

NAMES = {one.name for one in fields(SafetySettings)}
PLAIN = {one.name for one in fields(PlainOptions)}


def test_attach_s_keywords_are_the_fields() -> None:
    keywords = {
        name: one.default
        for name, one in inspect.signature(attach).parameters.items()
        if one.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert keywords == {one.name: one.default for one in fields(AttachOptions)}
    assert set(KEYWORDS) == set(keywords)


def test_attach_passes_every_keyword_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[AttachOptions] = []
    monkeypatch.setattr(hook, "_attach", lambda *args: seen.append(args[-1]))
    given: dict[str, Any] = {
        "penalty": SafetyPenalty(0.5),
        "ref_model": None,  # not beside a reference: below
        "reference": lambda ids, batch: ids,
        "positions": 3,
        "anchors": "default",
        "tokenizer": object(),
        "ref_every": 2,
        "ref_tokens": None,  # the same
        "path": "logits",
        "chunk_bytes": 4096,
        "backend": "torch",
    }
    assert set(given) == set(KEYWORDS), "a value for the new one"
    more = {"ref_model": torch.nn.Identity(), "ref_tokens": 5, "reference": None}
    for values in (given, given | more):
        attach(torch.nn.Identity(), SafetyTokens(ids=[1]), **values)
        for name, value in values.items():
            assert getattr(seen[-1], name) is value, name


def test_what_no_text_can_fill_is_made_of_settings_or_says_why_not() -> None:
    made_of: set[str] = set()
    for one in fields(AttachOptions):
        if one.name in PLAIN:
            assert one.name in NAMES and one.metadata["help"]
            continue
        assert bool(one.metadata["made_of"]) != bool(one.metadata["because"]), one.name
        made_of |= set(one.metadata["made_of"])
    assert made_of | PLAIN | {"tokens", "templates"} == NAMES
    of_penalty = {one.name for one in fields(SafetyPenalty)} - {"id_weights"}  # the tokens have
    assert of_penalty <= NAMES


def test_the_defaults_are_those_of_attach() -> None:
    options = keywords_of(SafetySettings(), chat_tokenizer())
    penalty, anchors = options.pop("penalty"), options.pop("anchors")
    assert vars(penalty) == vars(default_penalty("none"))
    assert vars(anchors) == vars(AnchorPrompts.default(chat_tokenizer()))
    parameters = inspect.signature(attach).parameters
    assert options == {name: parameters[name].default for name in options}


def test_every_field_arrives(tmp_path: Any) -> None:
    prompts, templates = tmp_path / "anchors.jsonl", tmp_path / "templates.txt"
    prompts.write_text('{"prompt": "help me"}\n{"prompt": "hello", "kind": "harmless"}\n')
    templates.write_text("sorry , but I can not help with that .\n")
    settings = SafetySettings(
        weight=0.5, kind="huber", temperature=2.0, delta=3.0, positions="4", ref_every=5,
        ref_tokens=6, path="logits", chunk_bytes=7, backend="torch", anchors=str(prompts),
        anchors_per_step=1, harmless_anchors_per_step=1, anchor_penalty_weight=0.25,
        templates=str(templates),
    )  # fmt: skip
    options = keywords_of(settings, chat_tokenizer(), seed=8)
    penalty, anchors = options.pop("penalty"), options.pop("anchors")
    found = (penalty.weight, penalty.kind, penalty.temperature, penalty.delta)
    assert found == (0.5, "huber", 2.0, 3.0)
    assert options == {name: getattr(settings, name) for name in PLAIN}
    assert (options["positions"], options["ref_every"], options["path"]) == (4, 5, "logits")
    assert (anchors.per_step, anchors.harmless_per_step) == (1, 1)
    assert (anchors.penalty_weight, anchors.seed) == (0.25, 8)
    tokens = tokens_of(settings, chat_tokenizer())
    assert tokens.pieces is not None and tokens.pieces[0] == "sorry"
    tokens.save(tmp_path / "tokens.json")
    read = tokens_of(SafetySettings(tokens=str(tmp_path / "tokens.json")), chat_tokenizer())
    assert torch.equal(read.ids, tokens.ids)


def test_the_paper_s_form_is_one_word() -> None:
    options = keywords_of(SafetySettings(positions="response"), chat_tokenizer())
    assert vars(options["penalty"]) == vars(SafetyPenalty())
    assert options["positions"] == "response" and "anchors" not in options


def test_a_relative_weight_of_the_anchors_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="Set `safety_anchor_penalty_weight`"):
        SafetySettings.of({"safety_anchor_weight": 1.0})


def test_the_template_s_options_reach_the_anchors() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ mark }}" + tokenizer.chat_template
    for given in ('{"mark": "hello "}', {"mark": "hello "}):
        settings = SafetySettings(chat_template_kwargs=given, answer_start="bye")
        rows = keywords_of(settings, tokenizer)["anchors"].rows
        text = tokenizer.decode(rows[0].input_ids)
        assert text.startswith("hello") and text.endswith("bye")
    with pytest.raises(ValueError, match="`safety_chat_template_kwargs` must be a JSON object"):
        SafetySettings.of({"safety_chat_template_kwargs": "[1]"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"positions": "response", "answer_start": "x"}, "`safety_answer_start` must be left out"),
        (
            {"positions": "all", "harmless_anchors_per_step": 1},
            "`safety_harmless_anchors_per_step` must be left out",
        ),
        (
            {"weight": 0.0, "anchor_penalty_weight": 0.5},
            "`safety_anchor_penalty_weight` must be left out .* and `safety_weight` is given",
        ),
        ({"positions": "some"}, "`safety_positions` must be 'none' .*; got 'some'"),
        ({"positions": "²"}, "`safety_positions` must be 'none' .*; got '²'"),  # a digit, no number
        ({"ref_every": 2}, "`safety_ref_every` and `safety_ref_tokens` must be left out"),
        ({"positions": "all", "ref_every": 0}, "`safety_ref_every` must be an int >= 1; got 0"),
        ({"path": "head"}, "`safety_path` must be one of linear, logits; got 'head'"),
        ({"chunk_bytes": 0}, "`safety_chunk_bytes` must be at least 1"),
        ({"backend": "cuda"}, "`safety_backend` must be one of auto,"),
        ({"kind": "l1"}, "`safety_kind` must be one of mse,"),
        ({"weight": -1.0}, "`safety_weight` must be finite and >= 0"),
        ({"anchors_per_step": -1}, "`safety_anchors_per_step` must be an int >= 0; got -1"),
        ({"tokens": "a", "templates": "b"}, "`safety_templates` must not be given together"),
    ],
    ids=lambda one: ",".join(one) if isinstance(one, dict) else "",
)
def test_settings_check_themselves(given: dict[str, Any], message: str) -> None:
    named = {f"safety_{name}": value for name, value in given.items()}
    with pytest.raises(ValueError, match=message):
        SafetySettings.of(named)
    with pytest.raises(ValueError, match=message.replace("safety_", "")):
        SafetySettings(**given)


def test_an_unknown_name_is_refused_and_none_can_be_changed() -> None:
    with pytest.raises(TypeError, match=r"`safety_wait` must be one of safety_weight, .*; got"):
        SafetySettings.of({"safety_wait": 1})
    with pytest.raises(FrozenInstanceError):
        SafetySettings().weight = 0.5  # type: ignore[misc] # which is the point


def test_attach_checks_before_it_looks_at_the_model(seed: int) -> None:
    model = fresh_lora(tiny_model("llama", seed))
    for options, message in (
        ({"chunk_bytes": 0}, "`chunk_bytes` must be at least 1"),
        ({"path": "head"}, "`path` must be one of linear, logits"),
        ({"ref_tokens": 3, "reference": "start"}, "`ref_tokens` must be None beside `reference`"),
    ):
        with pytest.raises(ValueError, match=message):
            attach(model, SafetyTokens(ids=[1]), positions="response", **options)
    with pytest.raises(TypeError, match="`penalty` must be a SafetyPenalty; got float"):
        attach(model, SafetyTokens(ids=[1]), positions="response", penalty=0.1)  # type: ignore[arg-type] # on purpose
