"""What once trained with another loss than it should, and said nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adapters import ADAPTERS, HEAD, assert_exact, build, move
from loss_checks import TOKENS
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_models import batch_of, fresh_lora, tiny_model
from tiny_rows import Padding, Rows, arguments_of, trained, trainer_of

from str_kernels import SafetyPenalty, attach
from str_kernels.integrations.trainers.hf_trainer import SafetyTrainer


@pytest.fixture
def lora(seed: int) -> tuple[Any, Any]:
    return build(ADAPTERS["LoRA"], seed)


def test_trainer_that_makes_the_loss_itself_is_refused(seed: int, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="`label_smoothing_factor`"):
        trained(seed, tmp_path, 2, 1, label_smoothing_factor=0.1)
    model = fresh_lora(tiny_model("llama", seed))
    with pytest.raises(ValueError, match="`compute_loss_func`"):
        trainer_of(model, arguments_of(tmp_path), compute_loss_func=lambda *_, **__: 0.0)


def test_a_step_without_labels_stops_the_trainer(seed: int, tmp_path: Any) -> None:
    def unlabelled(rows: Any) -> Any:
        batch = Padding().pad(rows)
        del batch["labels"]
        return batch

    model, arguments = fresh_lora(tiny_model("llama", seed)), arguments_of(tmp_path, max_steps=1)
    trainer = trainer_of(model, arguments, Rows(seed, 8), data_collator=unlabelled)
    with pytest.raises((RuntimeError, ValueError), match=r"safety loss|did not return a loss"):
        trainer.train()


def test_a_forward_put_in_our_place_is_noticed(lora: Any, seed: int) -> None:
    model, _ = lora
    inner = model.get_base_model()
    with attach(model, TOKENS, positions="response"):
        model(**batch_of(seed))
        ours = inner.forward
        inner.forward = type(inner).forward.__get__(inner)
        with pytest.raises(RuntimeError, match="forward was replaced"):
            model(**batch_of(seed))
        inner.forward = ours
        model(**batch_of(seed))
    assert not inner._forward_hooks


@pytest.mark.parametrize("name", ["Prompt tuning", "P-tuning", "Prefix tuning"])
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
def test_prompt_learning_takes_no_other_reference(name: str, seed: int) -> None:
    model, pristine = build(ADAPTERS[name], seed)
    for options in ({"ref_model": pristine}, {"reference": lambda *_: torch.zeros(3, 11, 4)}):
        with pytest.raises(ValueError, match="must be None for prompt learning"):
            attach(model, TOKENS, **options, positions="response")


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT:UserWarning")
def test_prompt_learning_over_another_adapter_is_refused(lora: Any) -> None:
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="other adapters below"):
        attach(get_peft_model(lora[0], config), TOKENS, positions="response")


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
def test_a_cache_with_labels_is_refused(lora: Any, seed: int) -> None:
    model, _ = lora
    batch = batch_of(seed)
    with torch.no_grad():
        cache = model(input_ids=batch["input_ids"][:, :4], use_cache=True).past_key_values
    rest = {name: batch[name][:, 4:] for name in ("input_ids", "labels")}
    with attach(model, TOKENS, positions="response"):
        with pytest.raises(ValueError, match="must be None when labels"):
            model(**rest, past_key_values=cache)
    assert cache.get_seq_length() == 4


def test_a_head_that_is_wrapped_or_merged_later_is_noticed(lora: Any, seed: int) -> None:
    model, pristine = lora
    config = LoraConfig(r=4, target_modules=HEAD, task_type="CAUSAL_LM")
    with attach(model, TOKENS, positions="response"):
        model.add_adapter("second", config)
        model.set_adapter("second")
        with pytest.raises(ValueError, match="keep the head that it was attached with"):
            model(**batch_of(seed))
    move(model, seed)
    assert_exact(model.train(), pristine, batch_of(seed))
    with attach(model, TOKENS, ref_model=pristine, positions="response"):
        model.merge_adapter()
        with pytest.raises(ValueError, match="no merged adapter on its head"):
            model(**batch_of(seed))


def test_a_dora_on_the_head_after_another_adapter(lora: Any, seed: int) -> None:
    """DoRA scales what came before it: one product more than the kernel takes."""
    _, pristine = lora
    config = {"r": 4, "target_modules": HEAD, "task_type": "CAUSAL_LM"}
    model = get_peft_model(copy.deepcopy(pristine), LoraConfig(**config))
    model.add_adapter("second", LoraConfig(**config, use_dora=True))
    model.base_model.set_adapter(["second", "default"])
    move(model, seed)
    assert_exact(model.train(), pristine, batch_of(seed))
    with attach(model, TOKENS, positions="response"):
        model.base_model.set_adapter(["default", "second"])
        with pytest.raises(ValueError, match="scales what another adapter added"):
            model(**batch_of(seed))
    assert_exact(model.train(), pristine, batch_of(seed), path="logits")


def test_a_reference_in_the_students_memory_is_refused(seed: int) -> None:
    student, ref_model = tiny_model("llama", seed).train(), tiny_model("llama", seed)
    ref_model.load_state_dict(student.state_dict(), assign=True)  # other Parameters, same memory
    ref_model.requires_grad_(False)
    with pytest.raises(ValueError, match="share no trainable parameter"):
        attach(student, TOKENS, ref_model=ref_model, positions="response")
    student.requires_grad_(False)
    student.model.norm.weight = torch.nn.Parameter(student.model.norm.weight.clone())
    with attach(student, TOKENS, ref_model=ref_model, positions="response"):
        model_loss = student(**batch_of(seed)).loss
        assert torch.isfinite(model_loss)
        student.requires_grad_(True)  # thawed behind our back
        with pytest.raises(ValueError, match="share no trainable parameter"):
            student(**batch_of(seed))


def test_a_base_thawed_later_is_noticed(lora: Any, seed: int) -> None:
    model, _ = lora
    with attach(model, TOKENS, positions="response"):
        model.requires_grad_(True)
        with pytest.raises(ValueError, match="must have frozen base weights"):
            model(**batch_of(seed))


def test_an_adapter_replaced_under_its_name_is_noticed(lora: Any, seed: int) -> None:
    model, _ = lora
    config = LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights="olora", task_type="CAUSAL_LM"
    )
    with attach(model, TOKENS, positions="response"):
        model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
        model.set_adapter("other")
        model.delete_adapter("default")
        model.add_adapter("default", config)
        with pytest.raises(ValueError, match="initialised by 'olora'"):
            model(**batch_of(seed))


@pytest.mark.parametrize("cut", [slice(None, -1), slice(1, None)])
def test_a_reference_one_position_short_is_refused(cut: slice, lora: Any, seed: int) -> None:
    model, pristine = lora

    def reference(ids: torch.Tensor, batch: Any) -> torch.Tensor:
        logits: torch.Tensor = pristine(**batch).logits[:, cut][..., ids]
        return logits

    with attach(model, TOKENS, reference=reference, positions="response"):
        with pytest.raises(ValueError, match="position for each"):
            model(**batch_of(seed))


def test_the_terms_of_a_second_run_and_of_a_resumed_one(seed: int, tmp_path: Any) -> None:
    """With weight 0 the cross-entropy is the loss, whatever steps the log stands for."""

    def trainer(steps: int) -> SafetyTrainer:
        arguments = arguments_of(
            tmp_path, max_steps=steps, logging_steps=2, save_steps=3, save_strategy="steps",
            gradient_accumulation_steps=2,
        )  # fmt: skip
        model = fresh_lora(tiny_model("llama", seed))
        return trainer_of(model, arguments, Rows(seed, 64), penalty=SafetyPenalty(0.0))

    first = trainer(3)
    first.train()
    first.train()
    resumed = trainer(7)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    entries = [e for t in (first, resumed) for e in t.state.log_history if "safety/ce" in e]
    assert len(entries) >= 4
    for entry in entries:
        assert entry["safety/ce"] == pytest.approx(entry["loss"], rel=1e-3)


def test_the_model_inside_a_peft_model_is_refused(lora: Any) -> None:
    with pytest.raises(ValueError, match="pass the PeftModel"):
        attach(lora[0].get_base_model(), TOKENS, positions="response")


def test_a_removed_handle_stays_removed(lora: Any) -> None:
    handle = attach(lora[0], TOKENS, positions="response")
    handle.remove()
    with pytest.raises(RuntimeError, match="was removed"):
        handle.__enter__()


@pytest.mark.parametrize("name", ["unsloth.models.llama", "unsloth_zoo.compiled"])
def test_a_forward_of_unsloth_s_is_refused(name: str, seed: int, monkeypatch: Any) -> None:
    model = fresh_lora(tiny_model("llama", seed))
    forward = type(model.get_base_model()).forward

    def theirs(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    theirs.__module__ = name
    monkeypatch.setattr(type(model.get_base_model()), "forward", theirs)
    with pytest.raises(ValueError, match=f"got {name}. Unsloth makes the loss"):
        attach(model, TOKENS, positions="response")


def test_a_model_in_zero_3_is_refused_before_deepspeed_has_it(seed: int) -> None:
    model = fresh_lora(tiny_model("llama", seed))
    next(model.parameters()).ds_id = 0  # as deepspeed.zero.Init marks what it has put away
    with pytest.raises(ValueError, match=r"after deepspeed\.initialize\(\) when ZeRO-3"):
        attach(model, TOKENS, positions="response")
