"""Adapters that were trained before: held to themselves, and the warning where they are not."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from adapters import move
from loss_checks import (
    ON_ROWS,
    TOKENS,
    anchors_of,
    assert_close,
    inputs_of,
    moved,
    naive_step,
    step_of,
)
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import batch_of, fresh_lora, tiny_model

from str_kernels import attach

TARGETS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "on the head": {"target_modules": ["q_proj", "lm_head"]},
    "a trained copy of the head": {"modules_to_save": ["lm_head"]},
    "PiSSA": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("what", TARGETS)
def test_it_is_what_a_copy_from_before_says(what: str, seed: int) -> None:
    model = get_peft_model(
        tiny_model("llama", seed),
        LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **TARGETS[what]}),
    ).train()
    move(model, seed)
    before, batch = copy.deepcopy(model).eval(), batch_of(seed)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    with attach(model, TOKENS, reference="start", **ON_ROWS) as handle:
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
        model(**batch)
        assert float(handle.last.penalty) == 0.0
        move(model, seed + 1)
        loss = model(**batch).loss
        got = step_of(model, loss, handle.last.penalty)
        assert got.penalty > 1e-4
    with torch.no_grad():
        ref = before(**inputs_of(batch)).logits
    assert_close(got, naive_step(model, ref, batch))
    assert list(model.peft_config) == ["default"] and model.active_adapter == "default"
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


def test_at_anchors_and_after_a_save(seed: int, tmp_path: Any) -> None:
    model = moved(seed)
    base = tiny_model("llama", seed)
    with attach(model, TOKENS, reference="start", anchors=anchors_of(seed)) as handle:
        model(**batch_of(seed))
        assert float(handle.last_anchors.penalty) == 0.0
        model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path)
    state = again.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value)


def test_a_model_that_has_moved_is_told(seed: int) -> None:
    anchors = anchors_of(seed)
    with pytest.warns(UserWarning, match="differs from its reference already.*reference='start'"):
        attach(moved(seed), TOKENS, anchors=anchors).remove()
    with pytest.warns(UserWarning, match="differs from its reference already"):
        other = tiny_model("llama", seed + 1)
        attach(tiny_model("llama", seed), TOKENS, ref_model=other, anchors=anchors).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        attach(fresh_lora(tiny_model("llama", seed)), TOKENS, anchors=anchors).remove()
        attach(moved(seed), TOKENS, reference="start", anchors=anchors).remove()
        model = tiny_model("llama", seed)
        attach(model, TOKENS, ref_model=copy.deepcopy(model), anchors=anchors).remove()


def test_what_has_no_start_is_refused(seed: int) -> None:
    anchors = anchors_of(seed)
    with pytest.raises(ValueError, match="`reference` must not be 'start' unless `model` is a Pef"):
        attach(tiny_model("llama", seed), TOKENS, reference="start", anchors=anchors)
    model = moved(seed)
    with pytest.raises(ValueError, match="`ref_model` must be None beside reference='start'"):
        other = tiny_model("llama", seed)
        attach(model, TOKENS, reference="start", ref_model=other, anchors=anchors)
    model.get_base_model().model.norm.weight.requires_grad_()
    with pytest.raises(ValueError, match="must not be 'start' with trainable base weights"):
        attach(model, TOKENS, reference="start", anchors=anchors)
