"""The planner: predicted peaks against what the allocator saw, configs alone, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS
from torch import Tensor
from transformers import AutoModelForCausalLM as Auto
from transformers import LlamaConfig, MambaConfig

from str_kernels import AnchorPrompts, SafetyTokens, attach
from str_kernels.integrations.anchors.prompts import AnchorRow
from str_kernels.integrations.plan.losses import chunked_loss, loss_by_hand
from str_kernels.integrations.plan.planner import PlanOptions, plan_of, read_config
from str_kernels.integrations.plan.step_memory import checkpoint_layers

IDS = 7
MAMBA = {"vocab_size": 31, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
ANCHOR_TOKENS = 9
WITHIN = 0.05


def llama(**options: Any) -> LlamaConfig:
    # a vocabulary that makes logits the largest tensors, as in life, and more than one chunk of 256
    sizes = {
        "vocab_size": 4099,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
    }
    return LlamaConfig(**{**sizes, **options})


def allocated(step: Callable[[], None], folder: Path) -> int:
    """Return the largest sum of what torch's allocator has given out, above what it had before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        step()
    trace = folder / "trace.json"
    profile.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    found = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    changes = [int(e["args"]["Bytes"]) for e in found]
    live = peak = 0
    for change in changes:
        live += change
        peak = max(peak, live)
    return peak


def model_and_batch(options: PlanOptions, config: Any, seed: int) -> tuple[Any, dict[str, Tensor]]:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    dtype = getattr(torch, options.dtype)
    model = Auto.from_config(config, dtype=dtype, attn_implementation=options.attention)
    model.config.use_cache = False
    if options.lora_rank is not None:
        lora = LoraConfig(r=options.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    if options.checkpointing:
        checkpoint_layers(model)
    rows = torch.randint(3, 4000, (options.batch_size, options.tokens))
    batch = {"input_ids": rows, "labels": rows}
    if options.padded:
        batch["attention_mask"] = torch.ones_like(rows)
        batch["attention_mask"][0, -2:] = 0
    return model.train(), batch


def step_of(way: str, options: PlanOptions, config: Any, seed: int) -> Callable[[], None]:
    model, batch = model_and_batch(options, config, seed)
    ids = torch.arange(3, 3 + IDS)
    if way == "ours":
        tokens = SafetyTokens(ids=ids.tolist())
        if options.reference == "none":
            rows = [AnchorRow(tuple(range(5, 5 + ANCHOR_TOKENS - i % 2))) for i in range(8)]
            attach(model, tokens, anchors=AnchorPrompts(rows, per_step=options.anchors))
        else:
            attach(model, tokens, positions="response")

    def step() -> None:
        if way == "by_hand":
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            with torch.no_grad(), model.disable_adapter():
                ref = model(**inputs).logits.float()
            loss_by_hand(model(**inputs).logits, batch["labels"], ids, ref).backward()
            return
        model(**batch).loss.backward()

    step()  # buffers that come with the first
    model.zero_grad()
    return step


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("own", {}),
        ("own", {"lora_rank": None, "dtype": "float32"}),
        ("own", {"attention": "eager", "padding": True}),
        ("by_hand", {"reference": "live"}),
        ("ours", {}),
        ("ours", {"reference": "live", "padding": True}),
        ("ours", {"batch_size": 1, "dtype": "float32"}),
    ],
)
def test_the_peak_is_what_the_allocator_saw(
    way: str, options: dict[str, Any], checkpointing: bool, seed: int, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = int(torch.randint(150, 300, (), generator=generator))
    settings: dict[str, Any] = {
        "batch_size": 2,
        "lora_rank": 4,
        "dtype": "bfloat16",
        "padding": False,
        "attention": "sdpa",
        **options,
    }
    planned = PlanOptions(
        tokens,
        checkpointing=checkpointing,
        ids=IDS,
        anchor_tokens=ANCHOR_TOKENS,
        device="cpu",
        **settings,
    )
    predicted = plan_of(llama(), planned).ways[way].step  # type: ignore[index]
    measured = allocated(step_of(way, planned, llama(), seed), tmp_path)
    assert abs(predicted - measured) <= WITHIN * measured, (predicted, measured)


def test_the_loop_over_chunks_is_the_loss_by_hand(seed: int) -> None:
    torch.manual_seed(seed)
    head = torch.nn.Linear(8, 53, bias=False)
    hidden = torch.randn(2, 11, 8)
    labels = torch.randint(53, (2, 11))
    ref, ids = torch.randn(2, 11, 53), torch.tensor([3, 9])
    by_hand = loss_by_hand(head(hidden), labels, ids, ref)
    target = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    rows = ref[..., ids].flatten(0, 1)
    chunked = chunked_loss(hidden.flatten(0, 1), head, target, ids, rows, rows=5)
    # one divides by the labels and the other by the rows
    drift = head(hidden)[..., ids] - ref[..., ids]
    penalty = 0.1 * drift.square().mean()
    torch.testing.assert_close((chunked - penalty) * 22, (by_hand - penalty) * 20)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_longest_rows_fit_and_longer_ones_do_not(attention: str) -> None:
    settings: dict[str, Any] = {"batch_size": 2, "lora_rank": 4, "attention": attention}
    settings |= {"padding": False, "device": "cpu", "dtype": "bfloat16"}
    room = 100 << 20
    planned = plan_of(llama(), PlanOptions(128, **settings), memory=room)
    for way in ("own", "ours"):
        found = planned.ways[way]  # type: ignore[index]
        assert found.longest is not None and found.longest < planned.positions
        for times, fits in ((1.0, True), (1.02, False)):
            at = PlanOptions(int(found.longest * times), **settings)
            assert (plan_of(llama(), at).ways[way].peak <= room * (1 + 2e-3)) is fits, (way, times)
    everything = plan_of(llama(), PlanOptions(128, **settings), memory=1 << 50)
    assert {found.longest for found in everything.ways.values()} == {8192}
    nothing = plan_of(llama(), PlanOptions(128, **settings), memory=1 << 10)
    assert {found.longest for found in nothing.ways.values()} == {0}


@pytest.mark.parametrize("name", CONFIGS)
def test_other_architectures_are_planned(name: str) -> None:
    config = CONFIGS[name]()
    before = config.to_dict()
    options = PlanOptions(16, batch_size=2, lora_rank=4, dtype="bfloat16", anchor_tokens=8)
    found = plan_of(config, options)
    assert config.to_dict() == before
    model = Auto.from_config(config, dtype=torch.bfloat16)
    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    # with adapters in float32, and rotary frequencies
    assert weights < found.weights <= weights + found.gradients + 4096
    assert found.optimizer > 2 * found.gradients
    assert all(way.peak > found.weights + found.activations for way in found.ways.values())


def test_what_costs_more_is_planned_as_more() -> None:
    base: dict[str, Any] = {"batch_size": 2, "padding": False, "dtype": "bfloat16"}
    plain = plan_of(llama(), PlanOptions(128, **base))

    def ours(**options: Any) -> int:
        return plan_of(llama(), PlanOptions(128, **{**base, **options})).ways["ours"].peak

    assert ours(checkpointing=True) < plain.ways["ours"].peak < ours(padding=True)
    assert plain.ways["ours"].peak < ours(accumulation=2) < ours(lora_rank=None)
    assert plan_of(llama(), PlanOptions(128, **base, lora_rank=None)).reference_weights > 0
    cached = PlanOptions(128, **base, lora_rank=None, reference="cached")
    assert plan_of(llama(), cached).reference_weights == 0


@pytest.mark.parametrize("as_file", [False, True])
def test_a_config_alone_is_enough(tmp_path: Path, as_file: bool) -> None:
    llama(num_hidden_layers=1).save_pretrained(tmp_path)
    source = tmp_path / "config.json" if as_file else tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    config = read_config(str(source))
    assert plan_of(config, PlanOptions(8, batch_size=1)).weights > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "must be a folder with config.json"),
        ("{", "must be 'builtin', a folder"),
        ("[]", "must be 'builtin', a folder"),
        ('{"model_type": "no such type"}', "must be 'builtin', a folder"),
        (
            '{"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}',
            "must be 'builtin', a folder",
        ),
    ],
)
def test_a_bad_config_is_said_in_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    (tmp_path / "code.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(ValueError, match=message) as raised:
        read_config(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be quantized"):
        plan_of(llama(quantization_config={"quant_method": "gptq"}), PlanOptions(8))
    with pytest.raises(ValueError, match="`memory` must be > 0; got 0"):
        plan_of(llama(), PlanOptions(8), memory=0)
    # attention heads that do not divide the width
    with pytest.raises(ValueError, match="`model` must be a causal LM"):
        plan_of(llama(num_key_value_heads=3), PlanOptions(8))
    with pytest.raises(ValueError, match=r"`model` must be a causal LM .* got ValueError: .*PEFT"):
        plan_of(MambaConfig(**MAMBA), PlanOptions(8))  # PEFT adapts no linear layer of it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 1}, "`tokens` must be >= 2; got 1"),
        ({"batch_size": 0}, "`batch_size` must be >= 1; got 0"),
        ({"lora_rank": 0}, "`lora_rank` must be >= 1; got 0"),
        ({"dtype": "int8"}, "`dtype` must be one of auto, .*; got 'int8'"),
        ({"attention": "flash"}, "`attention` must be one of auto, sdpa, eager; got 'flash'"),
        ({"reference": "both"}, "`reference` must be one of none, live, cached; got 'both'"),
        ({"device": "mps"}, "`device` must be one of cpu, cuda; got 'mps'"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanOptions(**{"tokens": 8, **options})
