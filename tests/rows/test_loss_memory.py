"""The memory of a loss: what the demo and the README report, and the promise they make."""

from __future__ import annotations

import sys

import pytest
import torch

from str_kernels import loss_memory, safety_linear_cross_entropy
from str_kernels.loss_memory import (
    loss_by_hand,
    measure_loss_memory,
    measure_peak,
    peak_in_child,
    random_inputs,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")


def test_both_providers_are_one_loss(rng):
    torch.manual_seed(int(torch.randint(2**31, (), generator=rng)))
    inputs = random_inputs(33, 24, 401, 9, torch.float64)
    hand = loss_by_hand(*[x.double() if x.is_floating_point() else x for x in inputs])
    ours = safety_linear_cross_entropy(*inputs).loss
    # by hand the logits are cast to float32, as transformers does
    assert float(ours.detach()) == pytest.approx(float(hand.detach()), rel=1e-6)


@linux
def test_a_peak_is_seen_although_it_is_gone_at_the_end():
    def spike():
        return float(torch.ones(60_000_000).sum())  # 240 MB, freed on return

    # glibc returns a block of this size to the system, so the next one counts again
    assert measure_peak(spike) > 200e6
    assert measure_peak(lambda: None) < 20e6


@linux
@pytest.mark.slow
def test_five_percent_of_the_memory_of_the_loss_by_hand():
    """The README's promise, at its size: 2,048 tokens of SmolLM2's head."""
    shape = {"tokens": 2048, "width": 576, "vocab": 49152, "ids": 64}
    by_hand, ours = (peak_in_child(name, **shape) for name in ("by_hand", "ours"))
    logits = 2048 * 49152
    assert by_hand > 4 * logits  # at least the float32 logits
    assert ours <= 0.05 * by_hand


@linux
def test_a_long_point_is_computed_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(loss_memory, "available_bytes", lambda: 10**9)
    peaks = {"by_hand": 1000, "ours": 10}
    monkeypatch.setattr(loss_memory, "peak_in_child", lambda name, **_: peaks[name])
    short, long = measure_loss_memory(100)
    assert (short.tokens, short.measured) == (100, True)
    assert (long.tokens, long.by_hand, long.ours, long.measured) == (400, 4000, 40, False)
    monkeypatch.setattr(loss_memory, "available_bytes", lambda: 10**11)
    assert measure_loss_memory(100)[1].measured


def test_a_failed_child_is_an_error_with_its_reason():
    with pytest.raises(RuntimeError, match=r"measuring nobody with .* failed: KeyError: 'nobody'"):
        peak_in_child("nobody", tokens=1, width=1, vocab=1, ids=1)
