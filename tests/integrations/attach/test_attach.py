"""attach() against the naive two-pass loss, and everything it must leave as it was."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import get_args

import pytest
import torch
from loss_checks import (
    ON_ROWS,
    TOKENS,
    WEIGHT,
    assert_close,
    attached_step,
    inputs_of,
    moved,
    naive_step,
    reference_logits,
)
from tiny_models import CONFIGS, VOCAB, batch_of, checkpoint, fresh_lora, tiny_model, with_lora
from torch import nn

from str_kernels import SafetyPenalty, SafetyTokens, attach
from str_kernels.integrations.models.probe import probe_head
from str_kernels.op.contracts import PenaltyKind

HEADS = ("llama", "gemma2", "granite")  # plain, capped, scaled
LOG_PROBS = {"compared": lambda logits: logits.log_softmax(-1)}


@pytest.mark.parametrize(
    ("name", "options", "by_hand"),
    [
        *((name, {"backend": x}, {}) for name in CONFIGS for x in ("torch", "triton", "eager")),
        *((name, {"penalty": SafetyPenalty(WEIGHT, "logprob")}, LOG_PROBS) for name in HEADS),
    ],
)
def test_lora_equals_the_naive_loss(name, options, by_hand, seed):
    model, batch = moved(seed, name), batch_of(seed)
    expected = naive_step(model, reference_logits(model, batch), batch, **by_hand)
    got = attached_step(model, batch, **options)
    assert_close(got, expected)
    assert got.penalty > 1e-4  # there is a drift
    # float32 logits of about 30: a difference of them carries 3e-6, squared and averaged
    assert got.penalty == pytest.approx(expected.penalty, rel=1e-4)


@pytest.mark.parametrize("kind", get_args(PenaltyKind))
def test_every_kind_is_zero_before_the_first_step(kind, seed):
    model = fresh_lora(tiny_model("llama", seed)).train()
    with attach(model, TOKENS, penalty=SafetyPenalty(kind=kind), positions="response") as handle:
        model(**batch_of(seed)).loss.backward()
        # The reference's lse and the student's come of products over other rows, since the student
        # leaves out those without a loss: 1e-6 apart, if at all. A KL of equals is a rounding, too.
        assert abs(float(handle.last.penalty)) <= (1e-10 if kind == "logprob" else 1e-7)
        assert kind in ("logprob", "subset_kl") or float(handle.last.penalty) == 0.0


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "gpt2"])
def test_full_fine_tuning_with_ref_model_equals_the_naive_loss(name, seed):
    model = tiny_model(name, seed).train()
    ref_model = tiny_model(name, seed + 7)
    batch = batch_of(seed)
    with torch.no_grad():
        ref_logits = ref_model.eval()(**inputs_of(batch)).logits
    ref_model.train()  # attach must put it in eval mode by itself and give it back in train mode
    expected = naive_step(model, ref_logits, batch)
    assert_close(attached_step(model, batch, ref_model=ref_model), expected)
    assert all(module.training for module in ref_model.modules())
    assert all(p.grad is None for p in ref_model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_penalty_is_exactly_zero_at_step_0(name, dtype, seed):
    # Dropout inside LoRA must not disturb it: with B = 0 it drops from a sum of zeros.
    model = fresh_lora(tiny_model(name, seed).to(dtype), lora_dropout=0.5).train()
    with attach(model, TOKENS, positions="response") as handle:
        model(**batch_of(seed)).loss.backward()
        assert float(handle.last.penalty) == 0.0 and float(handle.last.max_drift) == 0.0


def test_gradient_checkpointing_changes_nothing(seed):
    steps = []
    for kind in (None, True, False):
        model = moved(seed)
        if kind is not None:
            model.enable_input_require_grads()
            checkpoint(model, use_reentrant=kind)
        steps.append(attached_step(model, batch_of(seed)))
    for other in steps[1:]:
        assert other.loss == steps[0].loss
        for name, grad in steps[0].grads.items():
            assert torch.allclose(other.grads[name], grad, rtol=1e-5, atol=1e-8), name


@pytest.mark.parametrize("positions", [2, "all"])
def test_the_positions_that_are_asked_for(positions, seed):
    model, batch = moved(seed), batch_of(seed, rows=2, length=12)
    batch["labels"][0] = torch.tensor([-100, 5, 6, 7, 8, -100, -100, 9, 10, 11, -100, -100])
    batch["labels"][1] = torch.tensor([3, 4, -100, 6, -100, -100, -100, -100, -100, -100, -100, 8])
    rows = torch.zeros(2, 11)
    rows[0, [0, 1, 6, 7]] = 1.0  # two responses, the first two labels of each
    rows[1, [0, 2, 10]] = 1.0  # three responses of one label
    if positions == "all":  # but padding
        rows = (batch["attention_mask"][:, 1:] * batch["attention_mask"][:, :-1]).float()
    expected = naive_step(model, reference_logits(model, batch), batch, row_weight=rows)
    assert_close(attached_step(model, batch, positions=positions), expected)


def test_shift_labels_positional_arguments_and_tuples(seed):
    model = moved(seed)
    batch = batch_of(seed)
    inner = model.get_base_model()
    with attach(model, TOKENS, positions="response") as handle:
        loss = model(**batch).loss
        shifted = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        assert torch.equal(model(**inputs_of(batch), shift_labels=shifted).loss, loss)
        output = inner(batch["input_ids"], batch["attention_mask"], labels=batch["labels"])
        assert torch.equal(output.loss, loss)
        as_tuple = model(**batch, return_dict=False)
        assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], loss)
        assert output.logits is None
        handle.weight = 0.0
        without = model(**batch).loss
        assert torch.allclose(without, handle.last.ce) and not torch.equal(without, loss)


def test_eval_generate_and_remove_leave_no_trace(seed):
    model = with_lora(tiny_model("gemma2", seed), seed)
    batch = batch_of(seed)
    inner = model.get_base_model()
    before = set(vars(inner))
    hooks = len(inner.lm_head._forward_pre_hooks)
    frozen = {n: p.requires_grad for n, p in model.named_parameters()}
    model.eval()
    prompt = {"input_ids": batch["input_ids"][:, :4], "attention_mask": torch.ones(3, 4).long()}
    generated = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    evaluated = model(**batch)
    handle = attach(model, TOKENS, positions="response")
    assert not any(module.training for module in model.modules())
    with pytest.warns(UserWarning, match=r"no safety penalty, .* Call model.train\(\)"):
        again = model(**batch)
    model(**batch)  # it is said once
    assert torch.equal(again.loss, evaluated.loss) and torch.equal(again.logits, evaluated.logits)
    assert torch.equal(model.generate(**prompt, max_new_tokens=5, do_sample=False), generated)
    model.train()
    model.get_base_model().model.layers[0].eval()  # a mixed mode must survive too
    modes = {n: m.training for n, m in model.named_modules()}
    model(**batch).loss.backward()
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == frozen
    handle.remove()
    handle.remove()
    assert set(vars(inner)) == before and "forward" not in vars(inner)
    assert len(inner.lm_head._forward_pre_hooks) == hooks
    model.eval()
    assert torch.equal(model(**batch).logits, evaluated.logits)


def test_state_survives_an_error_inside_the_reference(seed, monkeypatch):
    model = moved(seed)
    name = next(n for n, p in model.named_parameters() if "lora_A" in n)
    dict(model.named_parameters())[name].requires_grad_(False)  # peft#3447 would thaw this one
    frozen = {n: p.requires_grad for n, p in model.named_parameters()}
    with attach(model, TOKENS, positions="response"):
        model(**batch_of(seed)).loss.backward()
        assert {n: p.requires_grad for n, p in model.named_parameters()} == frozen
        layer = model.get_base_model().model.layers[1]

        def broken(*_, **__):
            raise RuntimeError("layer failed")

        monkeypatch.setattr(layer, "forward", broken)
        with pytest.raises(RuntimeError, match="layer failed"):
            model(**batch_of(seed))
        assert all(m.training for m in model.modules())
        assert {n: p.requires_grad for n, p in model.named_parameters()} == frozen
        with monkeypatch.context() as restored:
            restored.setattr(layer, "forward", type(layer).forward.__get__(layer))
            logits = model(batch_of(seed)["input_ids"]).logits  # not of one position alone
            assert logits.shape[1] == batch_of(seed)["input_ids"].shape[1]
        status = model.get_model_status()
        assert status.enabled is True


def test_an_attached_model_can_be_pickled(seed):
    model = moved(seed)
    with attach(model, TOKENS, positions="response"):
        twin = pickle.loads(pickle.dumps(model)).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(twin[name], value, rtol=0, atol=0)


def test_signature_and_deepcopy(seed):
    model = moved(seed)
    inner = model.get_base_model()
    signature = inspect.signature(inner.forward)
    with attach(model, TOKENS, **ON_ROWS):
        assert inspect.signature(inner.forward) == signature
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        loss = twin(**batch_of(seed)).loss
        loss.backward()
    assert float(loss.detach()) > 1.0 and all(p.grad is None for p in model.parameters())


def test_last_is_none_before_the_first_step(seed):
    with attach(with_lora(tiny_model("llama", seed), seed), TOKENS, positions="response") as handle:
        assert handle.last is None


def test_probe_sees_scale_and_cap(seed):
    assert probe_head(tiny_model("llama", seed)).softcap is None
    assert probe_head(tiny_model("gemma2", seed)).softcap == 2.0
    assert probe_head(tiny_model("granite", seed)).logit_scale == 0.25
    # a config that states a cap the model does not apply must not be believed
    model = tiny_model("llama", seed)
    model.config.final_logit_softcapping = 30.0
    assert probe_head(model).softcap is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probe_in_16_bits_sees_an_ordinary_cap(dtype, seed):
    model = tiny_model("gemma2", seed)
    model.config.final_logit_softcapping = 30.0
    assert probe_head(model.to(dtype)).softcap == 30.0


class _Strange(nn.Module):
    """A causal LM that squares its logits."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.config = inner.config

    def get_output_embeddings(self):
        return self.inner.lm_head

    def forward(self, input_ids=None, labels=None, return_dict=True, **kwargs):
        output = self.inner(input_ids=input_ids)
        output.logits = output.logits.square()
        if labels is not None:
            output.loss = self.inner.loss_function(output.logits, labels, self.config.vocab_size)
        return output


def test_refusals_say_why(seed):
    def refused(match, model, **options):
        with pytest.raises(ValueError, match=match):
            attach(model, TOKENS, **options, positions="response")
        assert not isinstance(vars(model).get("forward"), object) or "forward" not in vars(model)

    llama = tiny_model("llama", seed)
    refused("`ref_model` must be given", llama)
    refused("`ref_model` must be another model", llama, ref_model=llama)
    refused("are not reproduced", _Strange(llama), ref_model=tiny_model("llama", seed))
    refused("output embeddings; Linear has none", nn.Linear(3, 3), ref_model=llama)
    refused("trains biases", with_lora(tiny_model("qwen2", seed), seed, bias="lora_only"))
    refused("'pissa'", with_lora(tiny_model("llama", seed), seed, init_lora_weights="pissa"))
    thawed = with_lora(tiny_model("llama", seed), seed)
    thawed.get_base_model().model.norm.weight.requires_grad_(True)
    refused("frozen base weights", thawed)
    small = tiny_model("llama", seed)
    small.resize_token_embeddings(100)
    refused("got id 130", with_lora(small, seed))
    twice = with_lora(tiny_model("llama", seed), seed)
    with (
        attach(twice, TOKENS, positions="response"),
        pytest.raises(ValueError, match="attached twice"),
    ):
        attach(twice, TOKENS, positions="response")
    with pytest.raises(ValueError, match="`positions`"):
        attach(twice, TOKENS, positions=0)
    with pytest.raises(TypeError, match="`safety_tokens`"):
        attach(twice, [1, 2], positions="response")
    with (
        attach(twice.train(), TOKENS, positions="response"),
        pytest.raises(ValueError, match="`logits_to_keep`"),
    ):
        twice(**batch_of(seed), logits_to_keep=3)


@pytest.mark.filterwarnings("ignore:The new")
def test_resized_vocabulary(seed):
    model = tiny_model("llama", seed)
    model.resize_token_embeddings(VOCAB + 30)
    model = with_lora(model, seed).train()
    tokens, batch = SafetyTokens(ids=[VOCAB + 29]), batch_of(seed)
    expected = naive_step(model, reference_logits(model, batch), batch, ids=tokens.ids)
    assert_close(attached_step(model, batch, tokens), expected)
    # The model's own loss reads the config too. It fails, and so would an evaluation.
    model.config.vocab_size = VOCAB
    with pytest.raises(ValueError, match="raised RuntimeError: shape"):
        attach(model, tokens, positions="response")
