"""The penalty at the anchors alone: no pass over the rows, and the default."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from loss_checks import (
    IDS,
    TOKENS,
    anchors_of,
    assert_close,
    attached_step,
    by_hand,
    moved,
    step_of,
)
from tiny_models import batch_of, fresh_lora, tiny_model
from tiny_tokenizer import chat_tokenizer
from transformers import TrainingArguments

from str_kernels import (
    AnchorPrompts,
    SafetyPenalty,
    SafetyTokens,
    attach,
    safety_linear_cross_entropy,
    safety_log_probs,
)
from str_kernels.attach_options import default_penalty
from str_kernels.integrations.trainers.hf_trainer import SafetyTrainer
from str_kernels.op import contracts


@pytest.mark.parametrize("path", ["linear", "logits"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_the_loss_is_the_model_s_own_and_the_anchors(name: str, path: Any, seed: int) -> None:
    model = moved(seed, name)
    batch, anchors = batch_of(seed), anchors_of(seed)
    penalty = by_hand(model, anchors, 0)
    expected = step_of(model, model(**batch).loss + penalty, penalty)
    got = attached_step(model, batch, anchors=anchors, path=path, positions="none")
    assert_close(got, expected)
    assert got.penalty == 0.0 and got.anchor_penalty > 1e-4


def test_the_reference_reads_the_anchors_once_and_no_row(seed: int) -> None:
    """What is counted is positions through the first layer, of student and reference together."""
    model = fresh_lora(tiny_model("llama", seed)).train()
    anchors, batch = anchors_of(seed, count=2, per_step=2, harmless_per_step=2), batch_of(seed)
    seen: list[int] = []
    layer = model.get_base_model().model.layers[0]
    with attach(model, TOKENS, anchors=anchors):
        layer.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[:2].numel()))
        model(**batch)
        model(**batch)
    rows = batch["input_ids"].numel()
    held = anchors.batch(anchors.draw(0)).input_ids.numel()
    assert seen == [rows, held, held, rows, held]


def test_the_penalty_s_weight_is_the_anchors_where_they_have_none(seed: int) -> None:
    model = moved(seed)
    batch = batch_of(seed)
    with attach(model, TOKENS, anchors=anchors_of(seed, penalty_weight=None)) as handle:
        plain = model(**batch).loss.detach() - 0.1 * handle.last_anchors.penalty  # by default
        handle.weight = 2.0
        loss = model(**batch).loss.detach()
        assert float(loss) == pytest.approx(
            float(plain + 2 * handle.last_anchors.penalty), rel=1e-6
        )
    with attach(model, TOKENS, anchors=anchors_of(seed, penalty_weight=0.7)) as handle:
        handle.weight = 2.0  # of the rows, which have none here
        loss = model(**batch).loss.detach()
        assert float(loss) == pytest.approx(
            float(plain + 0.7 * handle.last_anchors.penalty), rel=1e-6
        )


@pytest.mark.parametrize("own", [None, 0.7])
def test_a_new_weight_leaves_the_id_weights_where_they_are(
    own: float | None, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU each look at them and each copy would wait for the device."""
    model = moved(seed)
    id_weights = torch.rand(len(TOKENS), dtype=torch.float64) + 0.1  # copied, to the loss's dtype
    penalty = SafetyPenalty(0.5, "huber", delta=2.0, id_weights=id_weights)
    anchors = anchors_of(seed, penalty_weight=own)
    with attach(model, TOKENS, penalty=penalty, positions="response", anchors=anchors) as handle:
        model(**batch_of(seed))
        before = handle._forward.penalty.id_weights_on(torch.device("cpu"), torch.float32)

        def looked(_: Any) -> None:
            raise AssertionError("the id weights were looked at again")

        monkeypatch.setattr(contracts, "check_id_weights", looked)
        for weight in (1.5, torch.tensor(2.5)):
            handle.weight = weight
            model(**batch_of(seed))
            now = handle._forward.penalty
            assert now.id_weights_on(torch.device("cpu"), torch.float32) is before
            assert (now.weight, now.kind, now.delta) == (weight, "huber", 2.0)
            assert now.id_weights is id_weights and penalty.weight == 0.5
        for wrong in (-1.0, float("nan"), "1", torch.ones(2)):
            with pytest.raises((TypeError, ValueError), match="`weight` must"):
                handle.weight = wrong
        assert float(handle.weight) == 2.5


def test_full_fine_tuning_beside_a_frozen_copy(seed: int) -> None:
    model = tiny_model("llama", seed).train()
    frozen = copy.deepcopy(model).eval()
    with attach(model, TOKENS, ref_model=frozen, anchors=anchors_of(seed)) as handle:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            model(**batch_of(seed)).loss.backward()
            optimizer.step()
        assert handle.step == 2 and float(handle.last_anchors.penalty) > 0


def test_what_is_the_default_and_what_the_paper_s_form() -> None:
    assert default_penalty("none").kind == "coarse_kl"
    for positions in ("response", "all", 3):
        paper = default_penalty(positions)  # type: ignore[arg-type] # 3 is one
        assert (paper.kind, paper.weight) == ("mse", 0.1)


def test_the_package_s_anchors_need_a_tokenizer(seed: int) -> None:
    model = fresh_lora(tiny_model("llama", seed)).train()
    tokens = SafetyTokens(ids=IDS)
    with pytest.raises(ValueError, match=r"`tokenizer` must be given .* positions='response'"):
        attach(model, tokens)
    with pytest.raises(TypeError, match=r"`anchors` must be AnchorPrompts or 'default'; got 'a'"):
        attach(model, tokens, anchors="a", tokenizer=chat_tokenizer())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`positions` must be 'none'"):
        attach(model, tokens, positions="nowhere")  # type: ignore[arg-type]
    for name, value in (("ref_every", 2), ("ref_tokens", 4)):
        with pytest.raises(ValueError, match="`ref_every` and `ref_tokens` must be left out"):
            attach(model, tokens, anchors=anchors_of(seed), **{name: value})
    anchors = AnchorPrompts.default(chat_tokenizer())
    assert (len(anchors), anchors.per_step, anchors.harmless_per_step) == (132, 2, 2)


def test_the_trainer_takes_the_anchors_from_its_tokenizer(seed: int, tmp_path: Any) -> None:
    model = fresh_lora(tiny_model("llama", seed))
    batch = batch_of(seed, rows=4)
    rows = [{k: v[i] for k, v in batch.items()} for i in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, logging_steps=1, report_to="none", use_cpu=True,
        learning_rate=1e-2, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    options = {"safety_tokens": TOKENS, "processing_class": chat_tokenizer()}
    trainer = SafetyTrainer(model, arguments, train_dataset=rows, **options)
    trainer.train()
    first, last = trainer.state.log_history[0], trainer.state.log_history[1]
    assert first["safety/penalty"] == last["safety/penalty"] == 0.0
    assert abs(first["safety/anchor_penalty"]) < 1e-6 < last["safety/anchor_penalty"]


def test_tokens_with_weights(seed: int) -> None:
    """As from_contrast makes them; the rows, which are not compared, have none."""
    weighted = SafetyTokens(ids=IDS, id_weights=[2.0, 1.0, 0.5, 0.0])
    model = moved(seed)
    for options in ({}, {"positions": "response", "ref_every": 2}):
        with attach(model, weighted, anchors=anchors_of(seed), **options) as handle:
            for _ in range(2):
                model(**batch_of(seed)).loss.backward()
            assert float(handle.last_anchors.penalty) > 0


def test_the_reference_is_looked_at_in_each_step(seed: int) -> None:
    """Though it is asked for new anchors alone."""
    model = moved(seed)
    anchors = anchors_of(seed, count=2, per_step=2, harmless_per_step=2)
    with attach(model, TOKENS, anchors=anchors):
        model(**batch_of(seed))
        model.get_base_model().model.norm.weight.requires_grad_()
        with pytest.raises(ValueError, match="must have frozen base weights"):
            model(**batch_of(seed))
        model.get_base_model().model.norm.weight.requires_grad_(False)
        model.merge_adapter()
        with pytest.raises(ValueError, match="must not have its adapters merged"):
            model(**batch_of(seed))


def test_a_function_s_raw_logits_are_no_log_probabilities(seed: int) -> None:
    model = tiny_model("llama", seed).train()
    frozen = copy.deepcopy(model).eval()

    def raw(ids: Any, batch: Any) -> torch.Tensor:
        return 9 + frozen(**batch).logits[..., ids]

    def log_probs(ids: Any, batch: Any) -> torch.Tensor:
        return frozen(**batch).logits.log_softmax(-1)[..., ids]

    with attach(model, TOKENS, reference=log_probs, anchors=anchors_of(seed)) as handle:
        model(**batch_of(seed))
        assert abs(float(handle.last_anchors.penalty)) < 1e-6
    with (
        attach(model, TOKENS, reference=raw, anchors=anchors_of(seed)),
        pytest.raises(ValueError, match="`reference` must return log-probabilities"),
    ):
        model(**batch_of(seed))


@pytest.mark.parametrize("kind", ["coarse_kl", "logprob"])
def test_in_bfloat16_the_penalty_is_that_of_unrounded_logits(kind: Any, seed: int) -> None:
    """Where the model is sure of a safety token, 1 - sum p is small and its error must be too."""
    torch.manual_seed(seed)
    rows, width, vocab = 40, 64, 300
    hidden = torch.randn(rows, width).bfloat16().requires_grad_()
    head = torch.randn(vocab, width).bfloat16()
    ids = torch.arange(12)
    with torch.no_grad():  # of each row the probability of one safety token is about 0.95
        sure = hidden.float() @ head.float().t()
        for row in range(rows):
            own = head[row % 12].float()
            need = sure[row].logsumexp(0) + 3 - sure[row, row % 12]
            hidden[row] += (need / own.square().sum() * own).bfloat16()
    before = hidden.detach() + 0.05 * torch.randn(rows, width).bfloat16()
    ref = safety_log_probs(before, head, ids)
    exact_ref = (before.double() @ head.double().t()).log_softmax(-1)[:, ids]
    assert float((ref - exact_ref).abs().max()) < 1e-4
    options: dict[str, Any] = {
        "penalty": SafetyPenalty(1.0, kind), "reduction": "sum",
        "safety_row_weight": torch.ones(rows),
    }  # fmt: skip
    target = torch.full((rows,), -100)
    found = safety_linear_cross_entropy(hidden, head, target, ids, ref, **options)
    found.loss.backward()
    wide = hidden.detach().double().requires_grad_()
    exact = safety_linear_cross_entropy(
        wide, head.double(), target, ids, exact_ref, backend="eager", **options
    )
    exact.loss.backward()
    assert float(found.penalty) == pytest.approx(float(exact.penalty), rel=2e-3)
    error = (hidden.grad.double() - wide.grad).norm() / wide.grad.norm()
    assert float(error) < 0.02  # du is rounded once to bfloat16, and the product
