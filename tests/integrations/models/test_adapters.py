"""Adapters: exact against a copy from before PEFT saw the model, or refused with the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapters import ADAPTERS, HEAD, assert_exact, build, is_there, move
from loss_checks import IDS, ON_ROWS, TOKENS, gradients
from peft import LoraConfig, get_peft_model
from tiny_models import batch_of, tiny_model
from torch import nn

from str_kernels import attach
from str_kernels.integrations.models.heads import ModelHead

# PEFT's own calls
pytestmark = [
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_is_exact_or_refused(name: str, seed: int) -> None:
    adapter = ADAPTERS[name]
    if not is_there(adapter):
        pytest.skip(f"this release of PEFT has no {adapter.config}, or not all of its options")
    model, pristine = build(adapter, seed)
    batch = batch_of(seed)
    batch |= {name: torch.zeros(len(batch["labels"]), dtype=torch.int64) for name in adapter.inputs}
    if adapter.refused:
        with pytest.raises(ValueError, match=adapter.refused):
            attach(model, TOKENS, positions="response")
        return
    if adapter.path == "logits":
        with pytest.raises(ValueError, match="path='logits'"):
            attach(model, TOKENS, positions="response")
    assert_exact(model, pristine, batch, path=adapter.path)


NOT_COMPARED = {
    "CPT": "its forward computes another loss",
    "aLoRA": "does nothing before a token that is in no batch here",
    "MonteCLoRA": "no two forwards are alike",
    "LLaMA-Adapter": "PEFT does not register its parameters: there is nothing to move",
}


@pytest.mark.parametrize("name", [name for name, a in ADAPTERS.items() if a.refused])
def test_a_refused_adapter_is_exact_beside_a_frozen_copy(name: str, seed: int) -> None:
    if name in NOT_COMPARED or not is_there(ADAPTERS[name]):
        pytest.skip(NOT_COMPARED.get(name, "not in this release of PEFT"))
    model, pristine = build(ADAPTERS[name], seed)
    if name == "Poly":  # cannot run without task_ids, which attach() does not know at the start
        with pytest.raises(ValueError, match="task_ids"):
            attach(model, TOKENS, ref_model=pristine, positions="response")
        return
    assert_exact(model, pristine, batch_of(seed), ref_model=pristine)


@pytest.mark.parametrize("name", ["LoRA", "DoRA on the head", "LoRA, trained copy of the head"])
@pytest.mark.parametrize("path", ["linear", "logits"])
def test_both_paths_and_every_reference_agree(name: str, path: Any, seed: int) -> None:
    model, pristine = build(ADAPTERS[name], seed)
    batch = batch_of(seed)

    def reference(ids: torch.Tensor, inputs: Any) -> torch.Tensor:
        assert "labels" not in inputs and not torch.is_grad_enabled()
        logits: torch.Tensor = pristine(**inputs).logits[..., ids]
        return logits

    assert_exact(model, pristine, batch, path=path)
    assert_exact(model, pristine, batch, path=path, ref_model=pristine)
    assert_exact(model, pristine, batch, path=path, reference=reference)


def test_a_reference_on_another_adapter(seed: int) -> None:
    """An aligned model that is itself a LoRA: a frozen PeftModel is a reference like any other."""
    model, _ = build(ADAPTERS["LoRA"], seed)
    aligned, _ = build(ADAPTERS["LoRA on the head"], seed + 5)
    assert_exact(model, aligned.eval(), batch_of(seed), ref_model=aligned)


def two_loras(seed: int) -> tuple[Any, Any]:
    """Two LoRAs, on the body and on the head too, both in use."""
    pristine = tiny_model("llama", seed)
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(pristine), config)
    model.add_adapter("second", LoraConfig(r=2, target_modules=HEAD, task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])
    move(model, seed)
    return model.train(), pristine.eval()


def test_several_adapters_in_use(seed: int) -> None:
    model, pristine = two_loras(seed)
    assert_exact(model, pristine, batch_of(seed))
    model.base_model.set_adapter("second")  # after the handle is gone: the next one sees it
    assert_exact(model, pristine, batch_of(seed))


def test_switching_adapters_while_attached(seed: int) -> None:
    model, _ = two_loras(seed)
    batch = batch_of(seed)
    with attach(model, TOKENS, **ON_ROWS):
        both = float(model(**batch).loss.detach())
        model.base_model.set_adapter("second")
        second = float(model(**batch).loss.detach())
    with attach(model, TOKENS, **ON_ROWS):
        assert float(model(**batch).loss.detach()) == second != both


def test_a_frozen_adapter_stays_frozen(seed: int) -> None:
    model, pristine = two_loras(seed)
    for name, parameter in model.named_parameters():
        if ".default." in name:
            parameter.requires_grad_(False)  # PEFT's disable_adapter() would thaw these
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    assert_exact(model, pristine, batch_of(seed))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_adapters_by_transformers_alone(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers 5.24 asks for a release of PEFT that is not out; what it calls is in this one
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    pristine = tiny_model("llama", seed)
    model = copy.deepcopy(pristine)
    model.add_adapter(LoraConfig(r=4, target_modules=HEAD))
    move(model, seed)
    assert_exact(model.train(), pristine.eval(), batch_of(seed))
    model.disable_adapters()
    with pytest.raises(ValueError, match="adapters off"):
        attach(model, TOKENS, positions="response")


def test_merged_adapters(seed: int) -> None:
    model, pristine = build(ADAPTERS["LoRA"], seed)
    model.merge_adapter()
    with pytest.raises(ValueError, match="must not have its adapters merged"):
        attach(model, TOKENS, positions="response")
    model.unmerge_adapter()
    handle = attach(model, TOKENS, positions="response")
    model.merge_adapter()  # behind our back
    with pytest.raises(ValueError, match="must not have its adapters merged"):
        model(**batch_of(seed))
    handle.remove()
    model.unmerge_adapter()
    assert_exact(model, pristine, batch_of(seed))
    whole = model.merge_and_unload()
    whole.requires_grad_(True)
    with pytest.raises(ValueError, match="`ref_model` must be given"):
        attach(whole, TOKENS, positions="response")
    assert_exact(whole.train(), pristine, batch_of(seed), ref_model=pristine)


@pytest.mark.parametrize("how", ["adapters off", "ref_model"])
def test_no_use_inside_disable_adapter(how: str, seed: int) -> None:
    """The penalty would compare the reference with itself, and be 0 without a word."""
    model, pristine = build(ADAPTERS["LoRA"], seed)
    options = {"ref_model": pristine} if how == "ref_model" else {}
    with model.disable_adapter(), pytest.raises(ValueError, match="adapters off"):
        attach(model, TOKENS, **options, positions="response")
    if how == "ref_model":
        return  # which knows nothing of the student's adapters
    with attach(model, TOKENS, positions="response"):
        with model.disable_adapter(), pytest.raises(ValueError, match="adapters off"):
            model(**batch_of(seed))
        model(**batch_of(seed)).loss.backward()


def test_an_adapter_added_later_is_looked_at(seed: int) -> None:
    """One that moved the base on its way in."""
    model, _ = build(ADAPTERS["LoRA"], seed)
    with attach(model, TOKENS, positions="response"):
        options = {"init_lora_weights": "olora", "task_type": "CAUSAL_LM"}
        model.add_adapter("later", LoraConfig(r=4, target_modules=HEAD, **options))
        with pytest.raises(ValueError, match="'later' was initialised by 'olora'"):
            model(**batch_of(seed))


@pytest.mark.parametrize(
    ("option", "value", "match"),
    [
        *(
            ("init_lora_weights", init, f"'{init}', which changes the base weights")
            for init in ("loftq", "corda", "lora_ga", "pissa_niter_4", "one of tomorrow")
        ),
        ("peft_type", "SHADOW", "type SHADOW, which was not seen"),
        ("peft_type", "XLORA", "of type XLORA computes another"),
        ("arrow_config", object(), "chooses among adapters"),
    ],
)
def test_a_config_that_is_refused_by_its_name(
    option: str, value: Any, match: str, seed: int
) -> None:
    """These take data or other packages to build; attach() goes by what the config says."""
    model, _ = build(ADAPTERS["LoRA"], seed)
    setattr(model.peft_config["default"], option, value)
    with pytest.raises(ValueError, match=match):
        attach(model, TOKENS, positions="response")


@pytest.mark.parametrize("path", ["linear", "logits"])
@pytest.mark.parametrize("where", ["reference", "forward", "loss"])
@pytest.mark.parametrize("name", ["LoRA", "Prompt tuning", "ref_model"])
def test_state_survives_an_error(name: str, where: str, path: Any, seed: int) -> None:
    model, pristine = build(ADAPTERS["LoRA" if name == "ref_model" else name], seed)
    options = {"ref_model": pristine} if name == "ref_model" else {}
    for index, parameter in enumerate(model.parameters()):
        if parameter.requires_grad and index % 2:
            parameter.requires_grad_(False)
    inner = model.get_base_model()
    inner.model.layers[0].eval()  # a mixed mode
    pristine.model.layers[1].train()
    batch = batch_of(seed)

    def state() -> list[Any]:
        found: list[Any] = []
        for each in (model, pristine):
            found.append({name: p.requires_grad for name, p in each.named_parameters()})
            found.append({name: m.training for name, m in each.named_modules()})
        return [*found, torch.is_grad_enabled()]

    before = state()
    with attach(model, TOKENS, path=path, **options, positions="response"):
        wanted = float(model(**batch).loss.detach())
        assert state() == before
        hook = _break(inner, pristine, where, name)
        with pytest.raises((RuntimeError, ValueError), match=r"broken|labels"):
            if where == "loss":
                model(**{**batch, "labels": batch["labels"][:, :-1]})
            else:
                model(**batch)
        if hook is not None:
            hook.remove()
        assert state() == before
        assert float(model(**batch).loss.detach()) == wanted
        logits = inner(batch["input_ids"]).logits
        assert logits.shape[:2] == batch["input_ids"].shape  # and not one position alone


def _break(inner: nn.Module, pristine: nn.Module, where: str, name: str) -> Any:
    """Let one pass fail in its middle; the reference's is the one without gradient."""
    if where == "loss":
        return None
    model = pristine if (where, name) == ("reference", "ref_model") else inner

    def fail(*_: Any) -> None:
        if torch.is_grad_enabled() == (where == "forward"):
            raise RuntimeError("broken")

    return model.model.layers[1].register_forward_hook(fail)


def test_a_second_forward_in_the_same_step(seed: int) -> None:
    model, _ = build(ADAPTERS["LoRA on the head"], seed)
    one, two = batch_of(seed), batch_of(seed + 1)

    def grads_of(*losses: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        sum(loss() for loss in losses).backward()
        return gradients(model)

    with attach(model, TOKENS, **ON_ROWS):
        first, second = (grads_of(lambda b=b: model(**b).loss) for b in (one, two))
        both = grads_of(lambda: model(**one).loss, lambda: model(**two).loss)
        # a forward without labels between them, whose logits take part in the loss
        mixed = grads_of(
            lambda: model(**one).loss,
            lambda: model(input_ids=two["input_ids"]).logits.square().mean(),
        )
    plain = grads_of(lambda: model(input_ids=two["input_ids"]).logits.square().mean())
    for name, grad in both.items():
        assert torch.allclose(grad, first[name] + second[name], rtol=1e-4, atol=1e-6), name
        assert torch.allclose(mixed[name], first[name] + plain[name], rtol=1e-4, atol=1e-6), name


def test_two_attached_models_in_one_process(seed: int) -> None:
    models = [build(ADAPTERS["LoRA"], seed + i)[0] for i in range(2)]
    batch = batch_of(seed)
    alone = []
    for model in models:
        with attach(model, TOKENS, **ON_ROWS):
            alone.append(float(model(**batch).loss.detach()))
    with (
        attach(models[0], TOKENS, **ON_ROWS) as first,
        attach(models[1], TOKENS, **ON_ROWS) as second,
    ):
        losses = [model(**batch).loss for model in models]
        sum(losses).backward()
        assert [float(loss.detach()) for loss in losses] == alone
        assert first.last is not second.last and first.last != second.last
        first.remove()
        assert float(models[1](**batch).loss.detach()) == alone[1]


@pytest.mark.parametrize("name", ["Prompt tuning", "Prefix tuning", "P-tuning"])
@pytest.mark.parametrize("positions", ["all", 2])
def test_positions_beside_virtual_tokens(name: str, positions: Any, seed: int) -> None:
    """The same positions count as without virtual tokens, where nothing can be compared."""
    model, pristine = build(ADAPTERS[name], seed)
    batch = batch_of(seed)
    mask, labels = batch["attention_mask"], batch["labels"]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = model(**inputs).logits[:, -labels.shape[1] :]
        drift = (logits - pristine(**inputs).logits)[:, :-1, IDS].square().mean(dim=-1)
    kept = labels[:, 1:] != -100
    rows = (mask[:, 1:] * mask[:, :-1]).float()
    if positions == 2:
        rows = (kept & (kept.cumsum(dim=1) <= 2)).float()  # one response a row
    with attach(model, TOKENS, positions=positions) as handle:
        model(**batch)
        assert handle.last is not None
        expected = float((rows * drift).sum() / kept.sum())
        assert float(handle.last.penalty) == pytest.approx(expected, rel=1e-4)


def test_dropout_on_the_head_is_the_layers_own(seed: int) -> None:
    """attach() draws another mask than the layer would have; with the same one it is the same."""
    config = LoraConfig(r=4, target_modules=HEAD, lora_dropout=0.4, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model("llama", seed), config).train()
    move(model, seed)
    layer = model.get_base_model().lm_head
    hidden = torch.randn(7, 32)
    torch.manual_seed(seed)
    wanted = layer(hidden)
    torch.manual_seed(seed)
    weight, bias, low_rank = ModelHead(layer).operands(hidden)
    assert bias is None and low_rank is not None
    got = hidden @ weight.T + low_rank[0] @ low_rank[1].T
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)
    with attach(model, TOKENS, positions="response") as handle:
        assert torch.isfinite(model(**batch_of(seed)).loss) and handle.last is not None


def test_reference_arguments_are_named(seed: int) -> None:
    model, pristine = build(ADAPTERS["LoRA"], seed)
    prompt, _ = build(ADAPTERS["Prompt tuning"], seed)
    for options, match in (
        ({"reference": 3}, "`reference` must be a function"),
        ({"reference": print, "ref_model": pristine}, "without `ref_model`"),
        ({"ref_model": model}, "must be another model"),
        ({"ref_model": prompt}, "must not have virtual tokens"),
        ({"path": "middle"}, "`path` must be one of linear, logits; got 'middle'"),
    ):
        with pytest.raises(ValueError, match=match):
            attach(model, TOKENS, **options, positions="response")
    student = tiny_model("llama", seed)
    shares = tiny_model("llama", seed)
    shares.model.norm.weight = student.model.norm.weight
    with pytest.raises(ValueError, match=r"share no trainable parameter .* model.norm.weight"):
        attach(student, TOKENS, ref_model=shares, positions="response")
    batch = batch_of(seed)
    for values, error, match in (
        (None, TypeError, "floating-point tensor; got None"),
        (torch.zeros(3, 11, 3), ValueError, r"must return \(B, T, 4\)"),
        (torch.zeros(2, 11, 4), ValueError, "position for each"),
    ):
        options = {"reference": lambda *_, values=values: values, "positions": "response"}
        with attach(model, TOKENS, **options), pytest.raises(error, match=match):
            model(**batch)
