"""What is trained keeps its gradient: 4-bit layers on a CPU, and a step that would lose one."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from loss_checks import TOKENS, anchors_of
from tiny_models import batch_of, fresh_lora, quantised_llama, tiny_model
from torch import nn

from str_kernels import attach
from str_kernels.integrations.models.modes import is_packed

# 128 is a multiple of the 32 rows that bitsandbytes packs together, 120 is none; VOCAB is none.
TAKEN, REFUSED = 128, 120


def with_gradient(model: nn.Module, batch: dict[str, Any]) -> set[str]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=[TAKEN, REFUSED])
def load_4bit(request: Any, seed: int, tmp_path: Any) -> Any:
    load = quantised_llama(tmp_path, seed, 2 * request.param, load_in_4bit=True)
    return lambda: fresh_lora(load())  # in eval mode, as it was loaded


def test_4bit_layers_keep_their_gradients(load_4bit: Any, seed: int) -> None:
    batch = batch_of(seed)
    wanted = with_gradient(load_4bit().train(), batch)
    model = load_4bit()
    assert len(wanted) == 8
    with attach(model, TOKENS, positions="response"):
        model.train()
        for _ in range(2):
            assert with_gradient(model, batch) == wanted
    assert with_gradient(model, batch) == wanted


def test_a_4bit_model_that_was_evaluated_is_refused_or_trains(load_4bit: Any, seed: int) -> None:
    """By what became of its weights, which depends on the CPU and their sizes."""
    model, batch = load_4bit(), batch_of(seed)
    try:
        with torch.no_grad():
            model.eval()(**batch)
    except AssertionError:  # bitsandbytes' own, of sizes that it does not pack
        return
    model.train()
    if any(map(is_packed, model.modules())):
        with pytest.raises(ValueError, match="`model` must be loaded anew to be trained"):
            attach(model, TOKENS, positions="response")
    else:
        with attach(model, TOKENS, positions="response"):
            assert len(with_gradient(model, batch)) == 8


class Detached(nn.Module):
    """A layer that has lost its backward."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Any, **options: Any) -> Any:
        return self.layer(hidden.detach(), **options)


def test_a_step_without_the_gradients_of_the_last_raises(seed: int) -> None:
    """All but those of the last layer are gone: seen where the modules run again."""
    model = fresh_lora(tiny_model("llama", seed)).train()
    optimizer = trained_by(model)

    def step() -> None:
        optimizer.zero_grad()
        model(**batch_of(seed)).loss.backward()
        optimizer.step()

    with attach(model, TOKENS, positions="response"):
        step()
        layers = model.get_base_model().model.layers
        layers[-1] = Detached(layers[-1])
        step()
        with pytest.raises(RuntimeError, match=r"trained weights have no gradient .*layers\.0"):
            step()
        layers[-1] = layers[-1].layer
        step()


class NoBackward(torch.autograd.Function):
    """An op whose backward gives nothing, as one without a registered backward does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None


def trained_by(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def test_a_step_without_any_gradient_raises_at_once(seed: int) -> None:
    model = fresh_lora(tiny_model("llama", seed)).train()
    optimizer = trained_by(model)
    with attach(model, TOKENS, positions="response"):
        model(**batch_of(seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()  # without a backward: the caller's choice
        norm = model.get_base_model().model.norm
        norm.register_forward_hook(lambda _, __, output: NoBackward.apply(output))
        model(**batch_of(seed)).loss.backward()
        with pytest.raises(RuntimeError, match="8 of 8 trained weights have no gradient"):
            optimizer.step()


def test_every_optimizer_is_watched(seed: int) -> None:
    model = fresh_lora(tiny_model("llama", seed)).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    halves = [torch.optim.SGD(part, lr=1e-3) for part in (weights[:4], weights[4:])]
    with attach(model, TOKENS, positions="response"):
        for broken in (False, True):
            model(**batch_of(seed)).loss.backward()
            halves[0].step()
            if broken:
                halves[1].zero_grad()
                with pytest.raises(RuntimeError, match="4 of 4 trained weights"):
                    halves[1].step()
            else:
                halves[1].step()


def test_the_hooks_keep_no_model_alive_and_a_copy_has_its_own(seed: int) -> None:
    model = fresh_lora(tiny_model("llama", seed)).train()
    handle = attach(model, TOKENS, anchors=anchors_of(seed))
    twin = copy.deepcopy(model)
    seen = weakref.ref(model)
    del model, handle
    gc.collect()
    assert seen() is None
    forward = vars(twin.get_base_model())["forward"]
    optimizer = trained_by(twin)
    for step in range(3):
        twin(**batch_of(seed)).loss.backward()
        assert forward.anchor_pass.step == step
        optimizer.step()
    twin.get_base_model().model.norm.register_forward_hook(
        lambda _, __, output: NoBackward.apply(output)
    )
    optimizer.zero_grad()
    twin(**batch_of(seed)).loss.backward()
    # the anchors' pass goes through the same norm
    with pytest.raises(RuntimeError, match="trained weights have no gradient"):
        optimizer.step()


def test_a_weight_that_was_not_used_in_a_step_may_have_none(seed: int) -> None:
    """As an expert to which no token was sent, which trains all the same."""
    model = fresh_lora(tiny_model("llama", seed)).train()
    used, unused = nn.Parameter(torch.ones(())), nn.Linear(1, 1)
    model.get_base_model().extra = unused
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([*trained, used], lr=1e-3)
    with attach(model, TOKENS, ref_model=tiny_model("llama", seed), positions="response"):
        for also in (True, False, False, True, False):
            optimizer.zero_grad()
            loss = model(**batch_of(seed)).loss + used
            if also:
                loss = loss + unused(torch.ones(1)).sum()
            loss.backward()
            optimizer.step()
