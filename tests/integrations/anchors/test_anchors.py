"""Anchors: the loss by hand, accumulation, whose turn it is, and that nothing else changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from loss_checks import (
    ON_ROWS,
    TOKENS,
    WEIGHT,
    anchors_of,
    assert_close,
    assert_same_gradients,
    attached_step,
    by_hand,
    gradients,
    moved,
    naive_step,
    reference_logits,
)
from peft import PromptTuningConfig, get_peft_model
from tiny_models import batch_of, fresh_lora, tiny_model
from tiny_tokenizer import chat_tokenizer
from transformers import TrainingArguments

from str_kernels import AnchorPrompts, SafetyPenalty, attach
from str_kernels.integrations import chat
from str_kernels.integrations.anchors.prompts import AnchorRow
from str_kernels.integrations.trainers.hf_trainer import SafetyTrainer


@pytest.mark.parametrize("path", ["linear", "logits"])
@pytest.mark.parametrize("kind", ["mse", "logprob"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "gpt2"])
def test_loss_and_gradients_are_those_by_hand(name: str, kind: str, path: str, seed: int) -> None:
    model = moved(seed, name)
    batch, anchors = batch_of(seed), anchors_of(seed)
    compared = (lambda z: z.log_softmax(-1)) if kind == "logprob" else (lambda z: z)
    ref = reference_logits(model, batch)
    more = by_hand(model, anchors, 0, compared)
    expected = naive_step(model, ref, batch, more, compared=compared)
    options: dict[str, Any] = {"penalty": SafetyPenalty(WEIGHT, kind), "path": path}
    got = attached_step(model, batch, anchors=anchors, **options)
    assert_close(got, expected)
    assert got.anchor_penalty > 1e-4


@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("where", ["rows", "rows and anchors", "anchors"])
def test_accumulation_equals_one_batch(where: str, split: int, seed: int) -> None:
    model = moved(seed)
    batch = batch_of(seed, rows=4, length=12)  # uneven labels: 2 + row of them are masked
    items = int((batch["labels"][:, 1:] != -100).sum())
    alone = {"penalty": SafetyPenalty(WEIGHT, "coarse_kl"), "positions": "none"}
    options = ON_ROWS if "rows" in where else alone
    if "anchors" in where:
        options = {**options, "anchors": anchors_of(seed)}
    whole = attached_step(model, batch, **options)
    total = 0.0
    with attach(model, TOKENS, **options):
        for start in range(0, 4, 4 // split):
            part = {k: v[start : start + 4 // split] for k, v in batch.items()}
            loss = model(**part, num_items_in_batch=items).loss
            loss.backward()
            total += float(loss.detach())
    assert total == pytest.approx(whole.loss, rel=1e-6)
    assert_same_gradients(gradients(model), whole.grads, 1e-6 if "anchors" in where else 1e-5)


def test_a_fresh_lora_has_not_moved_at_any_anchor(seed: int) -> None:
    model = fresh_lora(tiny_model("llama", seed)).train()
    with attach(model, TOKENS, anchors=anchors_of(seed), positions="response") as handle:
        for step in range(4):
            handle.step = step
            model(**batch_of(seed)).loss.backward()
            assert float(handle.last_anchors.penalty) == float(handle.last_anchors.ce) == 0.0


class WithoutAHook:
    """An optimizer that is no torch.optim.Optimizer: its writes are counted by torch alone."""

    def __init__(self, trained: list[torch.Tensor], lr: float) -> None:
        self.trained, self.lr = trained, lr

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.trained:
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=self.lr)

    def zero_grad(self) -> None:
        for parameter in self.trained:
            parameter.grad = None


class OnCopies(torch.optim.SGD):
    """Trains copies of the weights and writes them back uncounted, as DeepSpeed's do."""

    def __init__(self, trained: list[torch.Tensor], **options: Any) -> None:
        self.trained = trained
        super().__init__([p.detach().clone() for p in trained], **options)

    def step(self, closure: Any = None) -> None:
        (group,) = self.param_groups
        for own, parameter in zip(group["params"], self.trained, strict=True):
            own.grad, parameter.grad = parameter.grad, None
        super().step(closure)
        for own, parameter in zip(group["params"], self.trained, strict=True):
            parameter.data.copy_(own)


OPTIMIZERS: dict[str, Any] = {
    "on copies": lambda trained: OnCopies(trained, lr=1e-3),
    "foreach": lambda trained: torch.optim.AdamW(trained, lr=1e-3, foreach=True),
    "fused": lambda trained: torch.optim.AdamW(trained, lr=1e-3, fused=True),  # counts no write
    "plain": lambda trained: torch.optim.SGD(trained, lr=1e-3),
    "no hook": lambda trained: WithoutAHook(trained, lr=1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_begins_when_an_optimizer_has_made_one(
    name: str, seed: int, monkeypatch: Any
) -> None:
    model = moved(seed)
    another = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    anchors = anchors_of(seed)
    asked: list[int] = []
    draw = AnchorPrompts.draw
    monkeypatch.setattr(
        AnchorPrompts, "draw", lambda self, step: asked.append(step) or draw(self, step)
    )
    optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
    steps = []
    with attach(model, TOKENS, anchors=anchors, positions="response") as handle:
        for step in range(3):
            for _ in range(2):
                model(**batch_of(seed)).loss.backward()
                if step > 0 and name not in ("on copies", "no hook"):  # whose is known by then
                    another.step()  # of another model
                steps.append(handle.step)
            optimizer.step()
            optimizer.zero_grad()
        handle.step = 11
        model(**batch_of(seed)).loss.backward()
        assert handle.step == 11
    assert steps == [0, 0, 1, 1, 2, 2] and asked == [0, 1, 2, 11]


@pytest.mark.parametrize("event", ["load", "freeze"])
def test_turns_go_on_on_copies_after_the_weights_were_written(event: str, seed: int) -> None:
    model = moved(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = OnCopies(trained, lr=1e-3)
    steps = []
    with attach(model, TOKENS, anchors=anchors_of(seed), positions="response") as handle:
        for step in range(5):
            model(**batch_of(seed)).loss.backward()
            steps.append(handle.step)
            optimizer.step()
            if step == 1 and event == "load":
                model.load_state_dict(model.state_dict())
            elif step == 1:
                trained[0].requires_grad_(False)
    assert steps == [0, 1, 2, 3, 4]


def test_the_reference_sees_each_anchor_once(seed: int) -> None:
    model = tiny_model("llama", seed).train()
    frozen = copy.deepcopy(model).eval()
    seen: list[int] = []

    def reference(ids: torch.Tensor, batch: Any) -> torch.Tensor:
        seen.append(len(batch["input_ids"]))
        return frozen(**batch).logits[..., ids]

    anchors = anchors_of(seed, count=4, per_step=2, harmless_per_step=2)
    with attach(
        model, TOKENS, reference=reference, anchors=anchors, positions="response"
    ) as handle:
        for step in range(6):
            handle.step = step
            model(**batch_of(seed)).loss.backward()
    # 6 batches of 3 rows, and twice 4 anchors: from the third step on all 8 are known
    assert sorted(seen) == [3] * 6 + [4] * 2


def test_every_anchor_has_its_turn_and_the_order_is_the_seeds(seed: int) -> None:
    anchors = anchors_of(seed, count=6, per_step=2, harmless_per_step=3, seed=seed)
    drawn = [anchors.draw(step) for step in range(6)]
    harmful = [place for step in drawn for place in step[:2]]
    assert sorted(harmful[:6]) == sorted(harmful[6:]) == list(range(6))
    harmless = [place for step in drawn for place in step[2:]]
    assert sorted(harmless[:6]) == list(range(6, 12))
    again = anchors_of(seed, count=6, per_step=2, harmless_per_step=3, seed=seed)
    assert [again.draw(step) for step in range(6)] == drawn
    other = anchors_of(seed, count=6, per_step=2, harmless_per_step=3, seed=seed + 1)
    assert [other.draw(step) for step in range(6)] != drawn


def test_without_labels_or_ids_or_training_there_are_no_anchors(seed: int) -> None:
    model = moved(seed)
    batch = batch_of(seed)
    calls: list[int] = []
    layer = model.get_base_model().model.layers[0]
    with attach(model, TOKENS, anchors=anchors_of(seed), positions="response"):
        hook = layer.register_forward_hook(lambda *_: calls.append(1))
        model(**batch).loss.backward()
        assert len(calls) == 4  # reference, batch, and the same for the anchors
        calls.clear()
        model(input_ids=batch["input_ids"])
        with torch.no_grad():
            model.eval()(**batch)
        assert len(calls) == 2
        hook.remove()
    model.train()
    unlabelled = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    with attach(model, TOKENS, anchors=anchors_of(seed), positions="response") as handle:
        model.zero_grad()
        model(**unlabelled).loss.backward()  # no label in it: a share of 0, and no NaN
        assert float(handle.last_anchors.penalty) == 0.0
        assert all(float(grad.abs().max()) == 0.0 for grad in gradients(model).values())


def test_prompt_learning_is_refused(seed: int) -> None:
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model("llama", seed), config)
    for options in ({"anchors": anchors_of(seed), "positions": "response"}, {}):
        with pytest.raises(ValueError, match=r"`anchors` must be None .* positions='response'"):
            attach(model, TOKENS, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty_weight": -1.0}, "`penalty_weight` must be finite and >= 0"),
        ({"penalty_weight": float("nan")}, "`penalty_weight` must be finite and >= 0"),
        ({"per_step": 0, "harmless_per_step": 0}, "must not both be 0"),
        ({"per_step": -1}, "`per_step` must be >= 0"),
        ({"per_step": 6}, "`per_step` must be at most 5, the harmful rows; got 6"),
    ],
)
def test_bad_numbers_are_named(options: dict[str, Any], message: str, seed: int) -> None:
    with pytest.raises(ValueError, match=message):
        anchors_of(seed, **options)


def test_bad_rows_are_named() -> None:
    with pytest.raises(ValueError, match=r"`held` must be in \[1, 2\]"):
        AnchorRow((4, 5), held=3)
    with pytest.raises(ValueError, match="`kind` must be"):
        AnchorRow((4, 5), kind="other")  # type: ignore[arg-type]


def test_prompts_are_rendered_up_to_the_answer(tmp_path: Any) -> None:
    tokenizer = chat_tokenizer()
    path = tmp_path / "anchors.jsonl"
    path.write_text('{"prompt": "help me"}\n{"prompt": "what is 1"}\n')
    anchors = AnchorPrompts.from_prompts(
        tokenizer, path, ["good day"], per_step=1, harmless_per_step=1
    )
    assert [row.kind for row in anchors.rows] == ["harmful", "harmful", "harmless"]
    text = tokenizer.decode(anchors.rows[1].input_ids)
    assert text.split() == "<user> what is 1 <end> <assistant>".split()
    assert {row.held for row in anchors.rows} == {1}
    with pytest.raises(ValueError, match="or more with `model`"):
        AnchorPrompts.from_prompts(tokenizer, path, positions=2)


def test_the_model_s_own_refusal_is_held_too(monkeypatch: Any) -> None:
    tokenizer = chat_tokenizer()
    said = {"help me": "sorry , but I can not help with that .", "what is 1": "1 2 3"}
    monkeypatch.setattr(
        chat,
        "continuations",
        lambda model, tokenizer, texts, **_: [
            next(tokenizer.encode(said[asked]) for asked in said if asked in text) for text in texts
        ],
    )
    anchors = AnchorPrompts.from_prompts(
        tokenizer, ["help me", "what is 1"], ["what is 1"], model=object(), positions=4
    )
    assert [row.held for row in anchors.rows] == [4, 1, 4]  # 1 2 3 is no refusal
    refused = anchors.rows[0].input_ids
    assert tokenizer.decode(refused[-3:]) == "sorry , but"


def test_the_trainer_logs_them_and_resumes_at_their_turn(seed: int, tmp_path: Any) -> None:
    def trainer(folder: str, **options: Any) -> tuple[SafetyTrainer, list[int]]:
        model = fresh_lora(tiny_model("llama", seed))
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=4, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, logging_steps=1, report_to="none", use_cpu=True,
            learning_rate=1e-2, lr_scheduler_type="constant", disable_tqdm=True, **options,
        )  # fmt: skip
        batch = batch_of(seed, rows=16)
        rows = [{k: v[i] for k, v in batch.items()} for i in range(16)]
        drawn: list[int] = []
        anchors = anchors_of(seed)
        draw = anchors.draw
        object.__setattr__(anchors, "draw", lambda step: drawn.append(step) or draw(step))
        options = {"safety_tokens": TOKENS, "anchors": anchors, "positions": "response"}
        return SafetyTrainer(model, arguments, train_dataset=rows, **options), drawn

    whole, drawn = trainer("whole", save_steps=2, save_strategy="steps")
    whole.train()
    assert drawn == [0, 1, 2, 3]
    log = [entry for entry in whole.state.log_history if "loss" in entry]
    assert log[0]["safety/anchor_penalty"] == 0.0 and log[3]["safety/anchor_penalty"] > 0.0
    resumed, drawn = trainer("resumed", save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert drawn == [2, 3]
    again = [entry for entry in resumed.state.log_history if "loss" in entry]
    for name in ("loss", "safety/anchor_penalty", "safety/max_drift"):
        assert again[-1][name] == pytest.approx(log[-1][name], rel=1e-5), name


@pytest.mark.parametrize("source", ["", "no such file"])
def test_a_source_that_is_none_is_named(source: str) -> None:
    for given in ({"prompts": source}, {"prompts": ["hello"], "harmless": source}):
        argument = list(given)[-1]
        with pytest.raises(ValueError, match=rf"^`{argument}` must be one of .*; got '{source}'"):
            AnchorPrompts.from_prompts(chat_tokenizer(), **given)
    with pytest.raises(ValueError, match=r"^`harmless` must hold at least one prompt"):
        AnchorPrompts.from_prompts(chat_tokenizer(), ["hello"], [])
