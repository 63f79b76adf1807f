"""What comparisons with the naive loss share: ids, weight, both steps, and how close is equal."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from tiny_models import VOCAB, naive_loss, tiny_model, with_lora
from torch import Tensor, nn

from str_kernels import AnchorPrompts, SafetyPenalty, SafetyTokens, attach
from str_kernels.integrations.anchors.prompts import AnchorRow

IDS = [5, 9, 77, 130]
TOKENS = SafetyTokens(ids=IDS)
WEIGHT = 0.3
PENALTY = SafetyPenalty(WEIGHT)
ON_ROWS: dict[str, Any] = {"penalty": PENALTY, "positions": "response"}


class Step(NamedTuple):
    """What a forward and backward came to."""

    loss: float
    penalty: float
    grads: dict[str, Tensor]
    anchor_penalty: float = 0.0


def moved(seed: int, name: str = "llama", **options: Any) -> Any:
    """A tiny model with a LoRA that has moved, in training mode."""
    return with_lora(tiny_model(name, seed), seed, **options).train()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in batch.items() if name != "labels"}


def reference_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits without the adapters."""
    with torch.no_grad(), model.disable_adapter():
        logits: Tensor = model.eval()(**inputs_of(batch)).logits
    model.train()
    return logits


def step_of(model: nn.Module, loss: Tensor, *penalties: Tensor) -> Step:
    """Go backward, and take the gradients out of the model."""
    model.zero_grad()
    loss.backward()
    grads = gradients(model)
    model.zero_grad()
    penalty, *more = (float(x.detach()) for x in penalties)
    return Step(float(loss.detach()), penalty, grads, *more)


def naive_step(model: Any, ref: Tensor, batch: Any, more: Any = 0.0, **options: Any) -> Step:
    """Take the step that one would write by hand, with `more` added to its loss."""
    options = {"ids": torch.tensor(IDS), **options}
    loss, penalty = naive_loss(model, ref, batch, weight=WEIGHT, **options)
    return step_of(model, loss + more, penalty)


def attached_step(model: Any, batch: Any, tokens: SafetyTokens = TOKENS, **options: Any) -> Step:
    """Take a step of the attached model: by default ON_ROWS."""
    with attach(model, tokens, **{**ON_ROWS, **options}) as handle:
        loss = model(**batch).loss
        anchored = [] if handle.last_anchors is None else [handle.last_anchors.penalty]
        return step_of(model, loss, handle.last.penalty, *anchored)


def assert_close(
    got: Step, expected: Step, loss_bound: float = 1e-5, grad_bound: float = 1e-4
) -> None:
    """Compare loss, and gradients by the largest entry of each, in float32."""
    assert abs(got.loss - expected.loss) <= loss_bound * abs(expected.loss)
    assert_same_gradients(got.grads, expected.grads, grad_bound)


def assert_same_gradients(
    got: dict[str, Tensor], wanted: dict[str, Tensor], bound: float = 1e-4
) -> None:
    assert got.keys() == wanted.keys() and got
    for name, grad in wanted.items():
        largest = float(grad.abs().max())
        assert float((got[name] - grad).abs().max()) <= bound * largest + 1e-9, name


def anchors_of(drawn_by: int, count: int = 5, **options: Any) -> AnchorPrompts:
    """Anchors of several lengths, half of them harmless, some held at more than one position."""
    generator = torch.Generator().manual_seed(drawn_by + 3)
    rows = [
        AnchorRow(
            tuple(torch.randint(3, VOCAB, (4 + 3 * row,), generator=generator).tolist()),
            held=1 + row % 3,
            kind=kind,
        )
        for kind in ("harmful", "harmless")
        for row in range(count)
    ]
    return AnchorPrompts(
        rows, **{"per_step": 2, "harmless_per_step": 1, "penalty_weight": 0.7, **options}
    )


def by_hand(model: Any, anchors: AnchorPrompts, step: int, compared: Any = lambda z: z) -> Any:
    """Return penalty_weight * the mean penalty of a step's held positions, one by one."""
    penalties = []
    for place in anchors.draw(step):
        row = anchors.rows[place]
        ids = torch.tensor([row.input_ids])
        now = compared(model(input_ids=ids).logits[0, -row.held :].float())
        with torch.no_grad(), model.disable_adapter():
            before = compared(model.eval()(input_ids=ids).logits[0, -row.held :].float())
        model.train()
        penalties.append((now[:, IDS] - before[:, IDS]).square().mean(dim=1))
    return anchors.penalty_weight * torch.cat(penalties).mean()
