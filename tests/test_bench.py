"""The speed bench at a toy size: its rows, and that a wrong provider is not timed."""

from __future__ import annotations

import pytest
import torch

from bench import speed
from bench.speed import HeadShape, measure

SMALL = HeadShape(vocab=307, width=32)


@pytest.mark.parametrize("train_head", [False, True])
def test_rows_say_what_was_measured(train_head, clean_memory):
    rows = measure(SMALL, 40, 5, torch.float32, train_head, 3, "cpu")
    assert [row["provider"] for row in rows] == ["eager", "ours (torch)", "bare products"]
    for row in rows:
        low, high = row["quartiles_ms"]
        assert 0 < low <= row["median_ms"] <= high
        assert row["pairs"] == 3 and row["torch"] == torch.__version__ and row["device"]
    assert rows[0]["against_eager"] == 1.0
    assert rows[1]["gradient_error"] <= 1e-5


def test_a_wrong_provider_is_refused(monkeypatch, clean_memory):
    def wrong(*inputs):
        return 1.2 * speed.loss_by_hand(*inputs)

    original = speed._providers
    monkeypatch.setattr(speed, "_providers", lambda *a: {**original(*a), "wrong": wrong})
    with pytest.raises(RuntimeError, match="wrong is wrong: loss off by"):
        measure(SMALL, 40, 5, torch.float32, False, 3, "cpu")
