"""SafetyTrainer on several ranks: a checkpoint goes on with more and fewer, a death is noticed."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
import training_on_ranks as training
from distributed_calls import PRELOADED
from ranks import run_ranks

pytestmark = [
    pytest.mark.slow,  # seven processes, each with a trainer of its own
    pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed package"),
]


def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_with_four(seed, tmp_path) -> None:
    """The same rows in each step, the same losses, the same weights at the end."""

    def run(ranks: int, name: str, resume: str | None = None):
        (folder := tmp_path / name).mkdir()
        arguments = (seed, str(folder), 4, resume)
        return run_ranks(ranks, training.train, *arguments, folder=folder, preload=PRELOADED)

    whole = run(2, "whole")
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    for name, grad in whole[0]["weights"].items():
        assert torch.equal(grad, whole[1]["weights"][name]), name
    for entry in whole[0]["log"]:  # the terms are of all ranks, as the loss is
        penalties = entry["safety/penalty"] + entry["safety/anchor_penalty"]
        assert entry["loss"] == pytest.approx(entry["safety/ce"] + 0.3 * penalties, rel=1e-5)
    for ranks in (1, 4):
        resumed = run(ranks, f"on {ranks}", checkpoint)[0]
        for one, other in zip(whole[0]["log"][2:], resumed["log"][2:], strict=True):
            for term in ("loss", "safety/ce", "safety/penalty", "safety/max_drift"):
                assert other[term] == pytest.approx(one[term], rel=2e-3), (ranks, term)
        for name, weight in whole[0]["weights"].items():
            close = {"rtol": 0, "atol": 2e-3 * float(weight.abs().max())}
            torch.testing.assert_close(resumed["weights"][name], weight, **close)


LAYERS = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [(2, {"fsdp": True, "fsdp_config": LAYERS}), (1, {"tensor_parallel": True})],
    ids=["fsdp2", "tensor-parallel"],
)
def test_a_spread_model_logs_what_a_whole_one_does(ranks, arguments, seed, tmp_path) -> None:
    """Losses, terms, drifts and the gradient's norm, with as many ranks that have own rows."""

    def run(name: str, ranks: int, arguments):
        (folder := tmp_path / name).mkdir()
        todo = (seed, str(folder), arguments)
        try:
            found = run_ranks(ranks, training.train_with, *todo, folder=folder, preload=PRELOADED)
        except RuntimeError as error:
            if "unexpected keyword argument" in str(error):  # tp_size, version
                pytest.skip("these transformers and accelerate have it not")
            raise
        return found[0]

    whole = run("whole", ranks, {})
    spread = run("spread", 2, arguments)
    assert spread["spread"] and not whole["spread"]
    for one, other in zip(whole["log"], spread["log"], strict=True):
        assert one["safety/max_drift"] > 0 or one["step"] == 1
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name


def test_anchors_and_reentrant_checkpointing_are_refused(seed, tmp_path) -> None:
    """DDP would reduce the gradients of the first of the two backwards and no others."""
    with pytest.raises(RuntimeError, match=r"ValueError: `anchors` must be None under reentrant"):
        run_ranks(
            2, training.train, seed, str(tmp_path), 1, None, False, True,
            folder=tmp_path, preload=PRELOADED,
        )  # fmt: skip


def test_a_killed_rank_ends_the_others_with_a_message(seed, tmp_path) -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        run_ranks(
            2, training.train, seed, str(tmp_path), 4, None, True,
            folder=tmp_path, preload=PRELOADED, gloo_seconds=10,
        )  # fmt: skip
    text = str(caught.value)
    assert text.startswith("rank 0: Traceback") and "rank 1: ended with exit code -9" in text
    assert "gloo" in text
    assert time.monotonic() - start < 100  # and not for ever
