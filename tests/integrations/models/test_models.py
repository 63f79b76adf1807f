"""attach() in the ways a model is used: masks, packing, autocast, torch.compile, Trainer, files."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from adapters import ADAPTERS, GRADIENT_BOUND, IDS, LOSS_BOUND, build, errors, move
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import CONFIGS, VOCAB, batch_of, tiny_model, with_lora
from tiny_rows import Padding, Rows, trained
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from str_kernels import SafetyPenalty, SafetyTokens, attach
from str_kernels.integrations.trainers.hf_trainer import SafetyTrainer

TOKENS = SafetyTokens(ids=IDS)
PENALTY = SafetyPenalty(0.3)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def step(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return float(loss.detach()), gradients(model)


def assert_same(one: tuple[float, Any], other: tuple[float, Any], rel: float = 1e-5) -> None:
    assert one[0] == pytest.approx(other[0], rel=rel)
    assert one[1].keys() == other[1].keys() and one[1]
    for name, grad in one[1].items():
        assert float((other[1][name] - grad).abs().max()) <= 1e3 * rel * float(grad.abs().max())


@pytest.mark.parametrize("path", ["linear", "logits"])
@pytest.mark.parametrize("name", CONFIGS)
def test_full_fine_tuning_on_both_paths(name: str, path: Any, seed: int) -> None:
    model, ref_model = tiny_model(name, seed).train(), tiny_model(name, seed + 7).eval()
    found = errors(model, ref_model, batch_of(seed), ref_model=ref_model, path=path)
    assert found[0] <= LOSS_BOUND and found[1] <= GRADIENT_BOUND, found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_on_either_side(side: str, name: str, attention: str, seed: int) -> None:
    model = with_lora(tiny_model(name, seed), seed).train()
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
    found = errors(model, pristine, batch)
    assert found[0] <= LOSS_BOUND and found[1] <= GRADIENT_BOUND, found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_equal_the_rows_alone(attention: str, checkpointing: bool, seed: int) -> None:
    """Without an attention mask, position_ids that start again are all that keeps them apart."""
    model = with_lora(tiny_model("llama", seed), seed).train()
    if checkpointing:
        inner = model.get_base_model()
        enable = getattr(inner, "activation_checkpointing_enable", None)
        enable = enable or inner.gradient_checkpointing_enable  # its name before 5.20
        enable({"use_reentrant": False})
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
    with attach(model, TOKENS, penalty=PENALTY, positions="response"):
        whole = step(model, packed)
        model.zero_grad()
        total = 0.0
        for batch in batches:
            loss = model(**batch, num_items_in_batch=count).loss
            loss.backward()
            total += float(loss.detach())
        parts = (total, gradients(model))
    assert_same(whole, parts)


@pytest.mark.parametrize("path", ["linear", "logits"])
def test_bfloat16_autocast(path: Any, seed: int) -> None:
    """Within a few bfloat16 roundings of float32, as the model's own loss under autocast is."""
    model, _ = build(ADAPTERS["LoRA on the head"], seed)
    batch = batch_of(seed)
    own_error = abs(float(_autocast(model, batch)[0]) - step(model, batch)[0])
    with attach(model, TOKENS, penalty=PENALTY, path=path, positions="response"):
        wanted, got = step(model, batch), _autocast(model, batch)
    assert abs(got[0] - wanted[0]) <= 4 * own_error + 4 * 2**-8 * wanted[0]
    for name, grad in wanted[1].items():
        assert got[1][name].dtype == torch.float32
        similar = torch.cosine_similarity(got[1][name].flatten(), grad.flatten(), dim=0)
        assert float(similar) > 0.99 or float(grad.abs().max()) < 1e-4, name


def _autocast(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    return float(loss.detach()), gradients(model)


@pytest.mark.parametrize("order", ["attached first", "compiled first"])
def test_torch_compile_of_the_model(order: str, seed: int) -> None:
    torch._dynamo.reset()
    model = with_lora(tiny_model("gemma2", seed), seed).train()
    batch = batch_of(seed)
    with attach(model, TOKENS, penalty=PENALTY, positions="response"):
        wanted = step(model, batch)
    if order == "compiled first":
        compiled = torch.compile(model, backend="eager")
    handle = attach(model, TOKENS, penalty=PENALTY, positions="response")
    if order == "attached first":
        compiled = torch.compile(model, backend="eager")
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        loss, _ = step(compiled, batch)
        assert_same((loss, gradients(model)), wanted)
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
    with attach(model, TOKENS, penalty=PENALTY, positions="response"):
        before = step(model, batch_of(seed))
        assert torch.equal(model.generate(**prompt, **settings), wanted)
        assert_same(step(model, batch_of(seed)), before)


@pytest.mark.parametrize("path", ["linear", "logits"])
def test_trainer_evaluates_with_the_models_own_loss_and_logits(
    path: Any, seed: int, tmp_path: Any
) -> None:
    model = with_lora(tiny_model("llama", seed), seed)
    seen = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"right": float(right.mean())}

    trainer = SafetyTrainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path), max_steps=2, eval_strategy="steps", eval_steps=1, report_to="none",
            disable_tqdm=True, remove_unused_columns=False, per_device_eval_batch_size=4,
            dataloader_pin_memory=False, learning_rate=1e-3, save_strategy="no",
        ),
        train_dataset=Rows(seed, 16),
        eval_dataset=Rows(seed + 1, 8),
        data_collator=lambda rows: Padding().pad(rows),
        compute_metrics=compute_metrics,
        safety_tokens=TOKENS,
        penalty=PENALTY,
        path=path,
    positions="response")  # fmt: skip
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
        with attach(
            model, TOKENS, ref_model=ref_model, penalty=SafetyPenalty(0.0), positions="response"
        ):
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
        with attach(
            model, TOKENS, ref_model=tiny_model("llama", seed), path=path, positions="response"
        ):  # type: ignore[arg-type]
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
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is of the extra 'dev', and for Linux")
    if (kind, head) == ("int8", "quantised"):
        pytest.skip("int8 keeps the head as it is unless told, and is then no different from nf4")
    from transformers import BitsAndBytesConfig, LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    options: dict[str, Any] = {"load_in_8bit": True}
    if kind == "nf4":
        options = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
    if head == "quantised":
        options["llm_int8_skip_modules"] = ["model.norm"]

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            tmp_path,
            quantization_config=BitsAndBytesConfig(**options),
            device_map={"": "cpu"},
            dtype=torch.float32,
        )

    model = get_peft_model(
        load(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ).train()
    move(model, seed)
    path: Any = "linear"
    if head == "quantised":
        with pytest.raises(ValueError, match=r"Linear4bit.*path='logits'"):
            attach(model, TOKENS, positions="response")
        path = "logits"
    # in training mode, which is the same function: with AVX512-BF16 nf4 is packed in the other
    found = errors(model, load().train(kind == "nf4"), batch_of(seed), path=path)
    assert found[0] <= LOSS_BOUND and found[1] <= GRADIENT_BOUND, found
