"""What comparisons with the naive loss share: ids, weight, gradients, and how close is equal."""

from __future__ import annotations

from str_kernels import SafetyTokens

IDS = [5, 9, 77, 130]
TOKENS = SafetyTokens(ids=IDS)
WEIGHT = 0.3


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
