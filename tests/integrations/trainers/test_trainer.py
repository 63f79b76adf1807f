"""SafetyTrainer and train_lora: the log, accumulation, and what is put back."""

from __future__ import annotations

import pytest
import torch
from tiny_models import fresh_lora, tiny_model
from tiny_rows import TOKENS, Padding, Rows, arguments_of, trained, trainer_of
from tiny_tokenizer import chat_tokenizer
from transformers import DataCollatorForSeq2Seq

from str_kernels import SafetyPenalty, SafetyTokens
from str_kernels.integrations.anchors.prompts import AnchorPrompts, AnchorRow
from str_kernels.integrations.demo.training import TrainingOptions, train_lora
from str_kernels.integrations.trainers.hf_trainer import SafetyTrainer

ANCHORS = AnchorPrompts([AnchorRow((5, 9, 2)), AnchorRow((7, 8))])


def test_accumulation_equals_one_batch_and_the_terms_are_logged(seed, tmp_path):
    _, whole = trained(seed, tmp_path, 8, 1)
    for batch_size, accumulation in ((4, 2), (1, 8)):
        _, parts = trained(seed, tmp_path, batch_size, accumulation)
        for one, other in zip(whole, parts, strict=True):
            for name in ("loss", "safety/ce", "safety/penalty", "safety/max_drift"):
                # Adam's first steps divide gradients by themselves, so rounding grows a little
                assert other[name] == pytest.approx(one[name], rel=2e-4, abs=1e-6), name
    for entry in whole:
        total = entry["safety/ce"] + 0.3 * entry["safety/penalty"]
        assert entry["loss"] == pytest.approx(total, rel=1e-4)
    assert whole[0]["safety/penalty"] == 0.0 and whole[-1]["safety/penalty"] > 0


def test_terms_are_averaged_between_logs(seed, tmp_path):
    _, each = trained(seed, tmp_path, 4, 2, steps=4)
    _, pairs = trained(seed, tmp_path, 4, 2, steps=4, logging_steps=2)
    assert (len(each), len(pairs)) == (4, 2)
    for pair, (first, second) in zip(pairs, (each[:2], each[2:]), strict=True):
        mean = (first["safety/ce"] + second["safety/ce"]) / 2
        assert pair["safety/ce"] == pytest.approx(mean, rel=1e-3)
        worst = max(first["safety/max_drift"], second["safety/max_drift"])
        assert pair["safety/max_drift"] == pytest.approx(worst, rel=1e-3)


def test_the_model_is_detached_after_training_and_after_a_failure(seed, tmp_path):
    trainer, _ = trained(seed, tmp_path, 2, 1, steps=1)
    inner = trainer.model.get_base_model()
    assert type(inner.forward).__name__ != "_SafetyForward"

    def fail(*_, **__):
        raise RuntimeError("stop")

    trainer.training_step = fail
    with pytest.raises(RuntimeError, match="stop"):
        trainer.train()
    assert type(inner.forward).__name__ != "_SafetyForward"


def test_ligers_loss_is_refused(seed, tmp_path):
    pytest.importorskip("liger_kernel", reason="without it transformers refuses by itself")
    with pytest.raises(ValueError, match="`liger_kernel_config` must switch Liger's losses off"):
        trained(seed, tmp_path, 2, 1, use_liger_kernel=True)


def test_train_lora_is_reproducible_and_weight_0_is_plain():
    seed = 3  # fixed: an inequality between two short runs holds for most seeds, not for all
    rows = [dict(row) for row in Rows(seed, 32).rows]
    options = TrainingOptions(
        steps=12, batch_size=4, learning_rate=5e-3, seed=5, positions="response"
    )

    def log_of(tokens, weight):
        model = tiny_model("llama", seed)
        # all-linear leaves the head out; the collator is transformers' own
        _, log = train_lora(model, chat_tokenizer(), rows, tokens, SafetyPenalty(weight), options)
        return log

    held, again = log_of(TOKENS, 20.0), log_of(TOKENS, 20.0)
    assert [entry["loss"] for entry in held] == [entry["loss"] for entry in again]
    plain, none = log_of(TOKENS, 0.0), log_of(SafetyTokens(ids=[]), 0.0)
    assert [e["loss"] for e in plain] == pytest.approx([e["loss"] for e in none], rel=1e-5)
    # The mean over the later steps: one step's value hangs on its four rows.
    drift = [sum(entry["safety/penalty"] for entry in log[6:]) for log in (plain, held)]
    assert drift[0] > drift[1] > 0
    assert none[-1]["safety/penalty"] == 0.0


@pytest.mark.parametrize(
    "field", [{"steps": 0}, {"learning_rate": 0.0}, {"lora_dropout": 1.0}, {"batch_size": 0}]
)
def test_options_check_themselves(field):
    with pytest.raises(ValueError, match=f"`{next(iter(field))}`"):
        TrainingOptions(**{"positions": "response", **field})


def test_the_collator_is_the_one_the_padding_stands_in_for(seed):
    rows = [dict(row) for row in Rows(seed, 5).rows]
    theirs = DataCollatorForSeq2Seq(chat_tokenizer(), label_pad_token_id=-100)(rows)
    ours = Padding().pad([dict(row) for row in Rows(seed, 5).rows])
    assert torch.equal(theirs["labels"], ours["labels"])
    assert torch.equal(theirs["input_ids"], ours["input_ids"])


def test_a_step_outside_of_train_is_refused(seed, tmp_path):
    model = fresh_lora(tiny_model("llama", seed))
    trainer = trainer_of(model, arguments_of(tmp_path, use_cpu=True))
    batch = Padding().pad(Rows(seed, 2).rows)
    with pytest.raises(RuntimeError, match=r"outside of train\(\) would have no safety loss"):
        trainer.compute_loss(model.train(), batch)
    assert trainer.compute_loss(model.eval(), batch) > 0


CONTEXT = "must be .* under context parallelism"


@pytest.mark.parametrize(
    ("parallel", "option", "match"),
    [
        ("cp", {"anchors": ANCHORS}, f"`anchors` {CONTEXT}"),
        ("cp", {"ref_tokens": 4}, f"`ref_tokens` {CONTEXT}"),
        ("cp", {"positions": 2}, f"`positions` {CONTEXT}"),
        ("cp", {"positions": "all"}, f"`positions` {CONTEXT}"),
        ("sp", {}, "`sp_size` must be 1"),
    ],
)
def test_what_needs_whole_rows_is_refused(parallel, option, match, seed, tmp_path, monkeypatch):
    """What reads them from their beginning, and with sequence parallelism all."""
    model = fresh_lora(tiny_model("llama", seed))
    trainer = trainer_of(model, arguments_of(tmp_path, use_cpu=True), **option)
    monkeypatch.setattr(SafetyTrainer, f"get_{parallel}_size", lambda self: 2, raising=False)
    with pytest.raises(ValueError, match=match):
        trainer.train()
    assert "forward" not in vars(model.get_base_model())
