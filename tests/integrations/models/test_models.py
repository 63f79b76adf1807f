"""attach() in the ways a model is used: masks, packing, autocast, torch.compile, Trainer, files."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from adapters import ADAPTERS, assert_exact, build, move
from loss_checks import ON_ROWS, TOKENS, Step, assert_close, gradients, moved, step_of
from peft import PeftModel
from tiny_models import (
    CONFIGS,
    VOCAB,
    batch_of,
    checkpoint,
    fresh_lora,
    quantised_llama,
    tiny_model,
)
from tiny_rows import Rows, arguments_of, trained, trainer_of
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from str_kernels import SafetyPenalty, attach


def step(model: Any, batch: dict[str, Any], autocast: bool = False) -> Step:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model(**batch).loss
    return step_of(model, loss, torch.zeros(()))


@pytest.mark.parametrize("path", ["linear", "logits"])
@pytest.mark.parametrize("name", CONFIGS)
def test_full_fine_tuning_on_both_paths(name: str, path: Any, seed: int) -> None:
    model, ref_model = tiny_model(name, seed).train(), tiny_model(name, seed + 7).eval()
    assert_exact(model, ref_model, batch_of(seed), ref_model=ref_model, path=path)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_on_either_side(side: str, name: str, attention: str, seed: int) -> None:
    model = moved(seed, name)
    model.get_base_model().set_attn_implementation(attention)
    pristine = tiny_model(name, seed).eval()
    pristine.set_attn_implementation(attention)
    batch = batch_of(seed)
    if side == "left":  # row i has i tokens of padding on its right
        batch = {
            key: torch.stack([row.roll(i) for i, row in enumerate(value)])
            for key, value in batch.items()
        }
        batch["position_ids"] = batch["attention_mask"].cumsum(dim=1).sub(1).clamp(min=0)
    assert_exact(model, pristine, batch)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_equal_the_rows_alone(attention: str, checkpointing: bool, seed: int) -> None:
    """Without an attention mask, position_ids that start again are all that keeps them apart."""
    model = moved(seed)
    if checkpointing:
        checkpoint(model, use_reentrant=False)
    model.get_base_model().set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, VOCAB, (1, n), generator=generator) for n in (4, 7, 5)]
    labels = [row.masked_fill(torch.arange(row.shape[1]) < 2, -100) for row in rows]
    packed = {
        "input_ids": torch.cat(rows, dim=1),
        "position_ids": torch.cat([torch.arange(row.shape[1]) for row in rows]).unsqueeze(0),
        "labels": torch.cat(labels, dim=1),
    }
    if not checkpointing:  # with a cache transformers does not look whether positions start again
        packed["use_cache"] = False
    batches = [
        {"input_ids": ids, "labels": target} for ids, target in zip(rows, labels, strict=True)
    ]
    count = sum(int((row[:, 1:] != -100).sum()) for row in labels)
    with attach(model, TOKENS, **ON_ROWS):
        whole = step(model, packed)
        total = 0.0
        for batch in batches:
            loss = model(**batch, num_items_in_batch=count).loss
            loss.backward()
            total += float(loss.detach())
    assert_close(Step(total, 0.0, gradients(model)), whole, grad_bound=1e-2)


@pytest.mark.parametrize("path", ["linear", "logits"])
def test_bfloat16_autocast(path: Any, seed: int) -> None:
    """Within a few bfloat16 roundings of float32, as the model's own loss under autocast is."""
    model, _ = build(ADAPTERS["LoRA on the head"], seed)
    batch = batch_of(seed)
    own_error = abs(step(model, batch, autocast=True).loss - step(model, batch).loss)
    with attach(model, TOKENS, path=path, **ON_ROWS):
        wanted, got = step(model, batch), step(model, batch, autocast=True)
    assert abs(got.loss - wanted.loss) <= 4 * own_error + 4 * 2**-8 * wanted.loss
    for name, grad in wanted.grads.items():
        assert got.grads[name].dtype == torch.float32
        similar = torch.cosine_similarity(got.grads[name].flatten(), grad.flatten(), dim=0)
        assert float(similar) > 0.99 or float(grad.abs().max()) < 1e-4, name


@pytest.mark.parametrize("order", ["attached first", "compiled first"])
def test_torch_compile_of_the_model(order: str, seed: int) -> None:
    torch._dynamo.reset()
    model = moved(seed, "gemma2")
    batch = batch_of(seed)
    with attach(model, TOKENS, **ON_ROWS):
        wanted = step(model, batch)
    if order == "compiled first":
        compiled = torch.compile(model, backend="eager")
    handle = attach(model, TOKENS, **ON_ROWS)
    if order == "attached first":
        compiled = torch.compile(model, backend="eager")
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        loss = compiled(**batch).loss
        assert_close(step_of(model, loss, loss), wanted, grad_bound=1e-2)
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    assert breaks <= 1  # in front of our own frame, which calls the model's code below it
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    model.eval()
    with torch.no_grad():
        logits = compiled(**batch).logits
        assert torch.allclose(logits, model(**batch).logits, atol=1e-5)
    handle.remove()
    model.train()
    assert torch.allclose(compiled(**batch).logits, model(**batch).logits, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_save_and_load_leave_no_trace(seed: int, tmp_path: Any) -> None:
    model, pristine = build(ADAPTERS["LoRA on the head"], seed)
    keys = set(model.state_dict())
    with attach(model, TOKENS, positions="response"):
        model(**batch_of(seed)).loss.backward()
        assert set(model.state_dict()) == keys
        model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(pristine, tmp_path / "adapter").eval()
    batch = batch_of(seed)
    assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)
    whole, ref_model = tiny_model("qwen2", seed).train(), tiny_model("qwen2", seed + 1)
    with attach(whole, TOKENS, ref_model=ref_model, positions="response"):
        whole(**batch).loss.backward()
        whole.save_pretrained(tmp_path / "whole")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    assert torch.equal(loaded(**batch).logits, whole.eval()(**batch).logits)


def test_generate_between_steps(seed: int) -> None:
    """As an evaluation within a run does, in training mode too, where transformers permits it."""
    model, _ = build(ADAPTERS["LoRA on the head"], seed)
    prompt = {"input_ids": batch_of(seed)["input_ids"][:, :4]}
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    settings = {"max_new_tokens": 6, "do_sample": False}
    wanted = model.generate(**prompt, **settings)
    with attach(model, TOKENS, **ON_ROWS):
        before = step(model, batch_of(seed))
        assert torch.equal(model.generate(**prompt, **settings), wanted)
        assert_close(step(model, batch_of(seed)), before, grad_bound=1e-2)


@pytest.mark.parametrize("path", ["linear", "logits"])
def test_trainer_evaluates_with_the_models_own_loss_and_logits(
    path: Any, seed: int, tmp_path: Any
) -> None:
    model = moved(seed)
    seen = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"right": float(right.mean())}

    arguments = arguments_of(
        tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, learning_rate=1e-3,
        per_device_eval_batch_size=4,
    )  # fmt: skip
    options = {"eval_dataset": Rows(seed + 1, 8), "compute_metrics": compute_metrics, "path": path}
    trainer = trainer_of(model, arguments, Rows(seed, 16), safety_tokens=TOKENS, **options)
    trainer.train()
    during = [e for e in trainer.state.log_history if "eval_loss" in e]
    assert len(during) == 2 and all(shape[-1] == VOCAB for shape in seen)
    after = trainer.evaluate()  # the model is itself again
    for name in ("eval_loss", "eval_right"):
        assert after[name] == during[-1][name]
    assert "forward" not in vars(model.get_base_model())


def test_a_model_that_takes_no_num_items(seed: int, tmp_path: Any, monkeypatch: Any) -> None:
    """Trainer then divides by the micro-steps itself, and so does the log of the terms."""
    cls = type(tiny_model("llama", seed))
    monkeypatch.setattr(cls, "accepts_loss_kwargs", False, raising=False)
    trainer, history = trained(seed, tmp_path, 4, 2)
    assert trainer.model_accepts_loss_kwargs is False
    for entry in history:
        total = entry["safety/ce"] + 0.3 * entry["safety/penalty"]
        assert entry["loss"] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("gates", ["model", "vector"])
def test_auxiliary_loss_of_experts(gates: str, seed: int) -> None:
    """It is added as the model does, and falls away where its router logits are not asked for."""
    model = tiny_model("mixtral", seed).train()
    ref_model = tiny_model("mixtral", seed + 1).eval()
    batch = batch_of(seed)
    losses = {}
    for wanted in (True, False):
        options = {"ref_model": ref_model, "penalty": SafetyPenalty(0.0), "positions": "response"}
        with attach(model, TOKENS, **options):
            losses[wanted] = model(**batch, output_router_logits=wanted).loss
        own = model(**batch, output_router_logits=wanted).loss
        assert float(losses[wanted].detach()) == pytest.approx(float(own.detach()), rel=1e-5)
    assert float(losses[True].detach()) > float(losses[False].detach()) + 0.01


def _tiny(cls: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return cls(config).train()


BERT = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
NOT_CAUSAL = {
    "a masked language model": (
        lambda: _tiny(BertForMaskedLM, BertConfig(**BERT)),
        "have next-token cross-entropy as its own loss",
    ),
    "an encoder and decoder": (
        lambda: _tiny(T5ForConditionalGeneration, T5Config(**T5, decoder_start_token_id=0)),
        "have next-token cross-entropy as its own loss",
    ),
    "a classifier": (
        lambda: _tiny(LlamaForSequenceClassification, CONFIGS["llama"]()),
        "have output embeddings|run on input_ids and labels",
    ),
}


@pytest.mark.parametrize("path", ["linear", "logits"])
@pytest.mark.parametrize("what", NOT_CAUSAL)
def test_what_is_no_causal_lm_is_refused(what: str, path: Any) -> None:
    make, match = NOT_CAUSAL[what]
    model = make()
    modes = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=match):
        attach(model, TOKENS, ref_model=make(), path=path, positions="response")
    assert "forward" not in vars(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_the_signature_trainer_reads_is_the_models(seed: int) -> None:
    for path in ("linear", "logits"):
        model = tiny_model("llama", seed)
        signature = inspect.signature(model.forward)
        options: dict[str, Any] = {"ref_model": tiny_model("llama", seed), "path": path}
        with attach(model, TOKENS, **ON_ROWS, **options):
            assert inspect.signature(model.forward) == signature


def test_the_model_on_two_devices_is_met_at_its_head(seed: int) -> None:
    """A head on "meta" stands for one that accelerate has put on a disk."""
    model = tiny_model("llama", seed)
    model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight, device="meta"))
    with pytest.raises(ValueError, match="in memory while it trains"):
        attach(model, TOKENS, ref_model=tiny_model("llama", seed), positions="response")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("head", ["plain", "quantised"])
def test_quantised_bodies(kind: str, head: str, seed: int, tmp_path: Any) -> None:
    if (kind, head) == ("int8", "quantised"):
        pytest.skip("int8 keeps the head as it is unless told, and is then no different from nf4")
    options: dict[str, Any] = {"load_in_4bit" if kind == "nf4" else "load_in_8bit": True}
    if head == "quantised":
        options["llm_int8_skip_modules"] = ["model.norm"]
    load = quantised_llama(tmp_path, seed, 256, **options)
    model = fresh_lora(load()).train()
    move(model, seed)
    path: Any = "linear"
    if head == "quantised":
        with pytest.raises(ValueError, match=r"Linear4bit.*path='logits'"):
            attach(model, TOKENS, positions="response")
        path = "logits"
    # in training mode, which is the same function: with AVX512-BF16 nf4 is packed in the other
    assert_exact(model, load().train(kind == "nf4"), batch_of(seed), path=path)
