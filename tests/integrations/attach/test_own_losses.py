"""docs/own_losses.md is run, and its gradients are those of full logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from doc_blocks import python_blocks, run_block
from tiny_models import VOCAB, tiny_model, with_lora
from tiny_tokenizer import chat_tokenizer, save_tiny_model
from torch import Tensor
from torch.nn.functional import kl_div, logsigmoid
from transformers import AutoModelForCausalLM

from str_kernels import SafetyTokens

PAGE = "docs/own_losses.md"
SHARED, DPO, KTO, LOG_PROB, TRL, DISTILL = python_blocks(PAGE)
IDS = [5, 9, 77, 130]
ID_WEIGHTS = torch.tensor([3.0, 0.0, 0.5, 1.0], dtype=torch.float64)
TOKENS = SafetyTokens(ids=IDS, id_weights=ID_WEIGHTS)
WEIGHT, BETA = 0.1, 0.1  # as on the page
# float64: what is left is rounding, in sums of a few hundred terms
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}


def answers(seed: int, rows: int = 4, length: int = 25) -> dict[str, Tensor]:
    """Prompts and answers of uneven length, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, VOCAB, (rows, length), generator=generator)
    ids, mask = labels.clone(), torch.ones_like(labels)
    for row in range(rows):
        labels[row, : 2 + row] = -100
        if row:
            labels[row, -row:], mask[row, -row:] = -100, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def compare_by_hand(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return log p / p_ref of each answer and the drift's weighted mean square, by hand."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    target = batch["labels"][:, 1:]
    kept = target != -100

    def log_p(logits: Tensor) -> Tensor:
        of_target = logits.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])
        return (of_target[..., 0] * kept).sum(dim=1)

    logits = model(**inputs).logits[:, :-1]
    with torch.no_grad(), model.disable_adapter():
        ref_logits = model(**inputs).logits[:, :-1]
    drift = (logits - ref_logits)[kept][:, IDS]
    return log_p(logits) - log_p(ref_logits), (drift.square() * ID_WEIGHTS).mean()


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.fixture
def space(seed: int) -> dict[str, Any]:
    """What the page has before its first block, with adapters that have moved."""
    model = with_lora(tiny_model("llama", seed), seed).double().train()
    pairs = answers(seed)
    given = {"peft_model": model, "tokens": TOKENS, "pairs": pairs}
    given |= {"answers": pairs, "desirable": torch.tensor([True, False, False, True])}
    run_block(PAGE, SHARED, given)
    return given


def test_dpo_is_that_of_full_logits(space: dict[str, Any]) -> None:
    model = space["peft_model"]
    log_ratio, penalty = compare_by_hand(model, space["pairs"])
    chosen, rejected = log_ratio[:2], log_ratio[2:]
    expected = -logsigmoid(BETA * (chosen - rejected)).mean() + WEIGHT * penalty
    expected.backward()
    wanted = gradients(model)
    run_block(PAGE, DPO, space)
    torch.testing.assert_close(space["loss"], expected, **CLOSE)
    torch.testing.assert_close(gradients(model), wanted, **CLOSE)
    torch.testing.assert_close(space["held"].penalty, penalty.detach(), **CLOSE)
    assert float(penalty.detach()) > 1e-3 and len(wanted) == 8


def test_kto_is_that_of_full_logits(space: dict[str, Any], seed: int) -> None:
    model = space["peft_model"]
    with torch.no_grad():  # one whose z0 is not cut off at 0
        drawn = (answers(seed + n) for n in range(1, 99))
        space["mismatched"] = next(x for x in drawn if compare_by_hand(model, x)[0].mean() > 0)
        z0 = compare_by_hand(model, space["mismatched"])[0].mean()
    log_ratio, penalty = compare_by_hand(model, space["answers"])
    value = BETA * (log_ratio - z0)
    each = torch.where(space["desirable"], 1 - value.sigmoid(), 1 - (-value).sigmoid())
    expected = each.mean() + WEIGHT * penalty
    expected.backward()
    wanted = gradients(model)
    run_block(PAGE, KTO, space)
    torch.testing.assert_close(space["loss"], expected, **CLOSE)
    torch.testing.assert_close(gradients(model), wanted, **CLOSE)


def test_log_probabilities_are_held_as_the_page_says(space: dict[str, Any], seed: int) -> None:
    run_block(PAGE, LOG_PROB, space)
    torch.manual_seed(seed)
    now, before = torch.randn(2, 7, 32, dtype=torch.float64)
    now.requires_grad_()
    terms = space["log_prob_terms"](now, before)
    terms.loss.backward()
    got, now.grad = now.grad, None
    log_p, log_ref = ((h @ space["head"].T).log_softmax(-1)[:, IDS] for h in (now, before))
    expected = WEIGHT * ((log_p - log_ref).square() * ID_WEIGHTS).mean()
    expected.backward()
    torch.testing.assert_close(terms.loss, expected, **CLOSE)
    torch.testing.assert_close(got, now.grad, **CLOSE)


def test_no_logits_are_kept(space: dict[str, Any]) -> None:
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    rows = int((space["pairs"]["labels"][:, 1:] != -100).sum())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compare_by_hand(space["peft_model"], space["pairs"])
        assert max(sizes) >= rows * VOCAB  # so such a tensor would be seen
        sizes.clear()
        run_block(PAGE, DPO, space)
    assert max(sizes) < rows * VOCAB


@pytest.mark.filterwarnings("ignore::UserWarning:trl", "ignore::FutureWarning")
def test_dpo_trainer_has_its_own_loss_and_the_penalty(seed: int, tmp_path: Any) -> None:
    trl = pytest.importorskip("trl")  # the oldest releases of the matrix are tested without it
    from datasets import Dataset
    from peft import LoraConfig

    ids = [10, 11, 13, 14]
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "model", seed))
    rows = [
        {"prompt": f"what is {a} +", "chosen": " 1 + 2" * a, "rejected": " good day sorry"}
        for a in (1, 2, 3, 4)
    ]
    space: dict[str, Any] = {
        "peft_model": with_lora(tiny_model("llama", seed), seed),
        "tokens": SafetyTokens(ids=ids),
        "model": model,
        "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        "preferences": Dataset.from_list(rows),
        "tokenizer": chat_tokenizer(),
        "config": trl.DPOConfig(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_steps=3,
            per_device_train_batch_size=4, logging_steps=1, learning_rate=1e-2, disable_tqdm=True,
            save_strategy="no",
        ),
    }  # fmt: skip
    run_block(PAGE, SHARED, space)
    run_block(PAGE, TRL, space)
    trainer = space["trainer"]
    first, *_, last = (e for e in trainer.state.log_history if "loss" in e)
    assert first["safety/penalty"] == 0.0 < last["safety/penalty"]

    model = trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    own = trl.DPOTrainer.compute_loss(trainer, model, batch)
    with_ids = model(**inputs).logits[:, :-1]
    with torch.no_grad(), model.disable_adapter():
        before = model(**inputs).logits[:, :-1]
    drift = (with_ids - before)[labels[:, 1:] != -100][:, ids]
    expected = own + WEIGHT * drift.square().mean()
    expected.backward()
    wanted = gradients(model)
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    assert float((loss - own).detach()) > 1e-5
    # float32, where full logits and the K of them are rounded apart
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-4, atol=1e-6)


def test_distillation_is_exact_over_the_ids_and_blind_beside_them(
    space: dict[str, Any], seed: int
) -> None:
    torch.manual_seed(seed)
    student, teacher = space["peft_model"].get_base_model(), tiny_model("llama", seed + 1).double()
    ids, input_ids = torch.tensor(IDS), torch.randint(3, VOCAB, (2, 9))
    hidden = torch.randn(18, 32, dtype=torch.float64, requires_grad=True)
    space |= {
        "teacher": teacher, "ids": ids, "input_ids": input_ids, "hidden": hidden,
        "target": torch.randint(0, VOCAB, (18,)),
    }  # fmt: skip
    run_block(PAGE, LOG_PROB, space)  # whose import it goes on with
    run_block(PAGE, DISTILL, space)
    got = space["hidden"].grad
    hidden.grad = None
    of_teacher = teacher(input_ids).logits.detach().flatten(0, 1)
    logits = hidden @ student.lm_head.weight.T

    def divergence(z: Tensor, t: Tensor) -> Tensor:  # T^2 KL(teacher || student), T = 2
        return 4 * kl_div((z / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="batchmean")

    by_kl = divergence(logits[:, ids], of_teacher[:, ids])
    gap = logits.log_softmax(-1)[:, ids] - of_teacher.log_softmax(-1)[:, ids]
    torch.testing.assert_close(space["by_kl"].penalty, by_kl.detach(), **CLOSE)
    torch.testing.assert_close(space["by_log_probs"].penalty, gap.detach().square().mean(), **CLOSE)
    ce = torch.nn.functional.cross_entropy(logits, space["target"])
    (2 * ce + by_kl + gap.square().mean()).backward()
    torch.testing.assert_close(got, hidden.grad, **CLOSE)
    # more probability on these ids than on all the others: seen by logprob alone
    raised = of_teacher.index_fill(1, ids, 0.0)
    raised[:, ids] = logits.detach()[:, ids] + 10.0
    assert abs(float(divergence(logits[:, ids], raised[:, ids]).detach())) < 1e-9
    assert float(divergence(logits, raised).detach()) > 0.1
    space["ids"] = torch.arange(VOCAB)
    run_block(PAGE, DISTILL, space)
    whole = divergence(logits, of_teacher).detach()
    torch.testing.assert_close(space["by_kl"].penalty, whole, **CLOSE)
