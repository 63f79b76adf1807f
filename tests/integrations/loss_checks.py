"""What comparisons with the naive loss share: ids, weight, gradients, and how close is equal."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import VOCAB

from str_kernels import AnchorPrompts, SafetyPenalty, SafetyTokens
from str_kernels.integrations.anchors.prompts import AnchorRow

IDS = [5, 9, 77, 130]
TOKENS = SafetyTokens(ids=IDS)
WEIGHT = 0.3
PENALTY = SafetyPenalty(WEIGHT)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(loss, expected, got, wanted):
    # The bounds: 1e-5 on the loss, 1e-4 of the largest gradient entry, in float32.
    assert abs(float(loss.detach()) - float(expected.detach())) <= 1e-5 * abs(
        float(expected.detach())
    )
    assert got.keys() == wanted.keys() and got
    for name, grad in wanted.items():
        largest = float(grad.abs().max())
        assert float((got[name] - grad).abs().max()) <= 1e-4 * largest + 1e-9, name


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


def reference_logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad(), model.disable_adapter():
        logits: torch.Tensor = model.eval()(**inputs).logits
    model.train()
    return logits
