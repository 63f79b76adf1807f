"""attach() and SafetyTrainer under DeepSpeed's ZeRO: losses and gradients of one process.

Gloo ranks on this machine; deepspeed_cases.py is what runs there. DeepSpeed is no dependency of the
tests: it has to be built for the torch that is there (`make deepspeed` does so, in .nox).
"""

from __future__ import annotations

import os
from typing import Any

import deepspeed_cases as cases
import pytest
import training_on_ranks as training
from ranks import run_ranks

pytest.importorskip("deepspeed")

LOSS, GRADIENTS = 2e-5, 1e-4  # as in test_distributed.py


@pytest.fixture(autouse=True, scope="module")
def on_a_cpu():
    before = os.environ.get("DS_ACCELERATOR")
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.comm.torch import build_shm_op

    build_shm_op()  # compiled once, in minutes that the ranks would take for a hang
    yield
    if before is None:
        del os.environ["DS_ACCELERATOR"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    todo = {
        name: (function, *stage_and_training, 11, options)
        for name, (function, *stage_and_training, options) in cases.CALLS.items()
    }
    todo["refusals"] = ("refusals", 11, {})
    for stage in (0, 2):
        todo[f"bfloat16, ZeRO-{stage}"] = ("turns_in_bfloat16", 11, stage, {})
    return run_ranks(2, cases.run_all, todo, folder=tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", cases.CALLS)
def test_three_steps_equal_those_of_one_process(name: str, found) -> None:
    for of_rank in found:
        errors = of_rank[name]
        assert isinstance(errors, dict), errors
        assert errors["loss"] <= LOSS and errors["gradients"] <= GRADIENTS


@pytest.mark.parametrize("stage", [0, 2])
def test_anchors_take_turns_where_the_optimizer_has_copies(stage: int, found) -> None:
    for of_rank in found:
        assert of_rank[f"bfloat16, ZeRO-{stage}"] == [0, 1, 2, 3]


def test_what_is_refused(found) -> None:
    for of_rank in found:
        said = of_rank["refusals"]
        assert "after deepspeed.initialize() when ZeRO-3" in said["attached before initialize"]
        assert "`ref_model` must be whole on each rank" in said["a ref_model that is put away"]


@pytest.mark.parametrize("stage", [2, 3])
def test_safety_trainer_logs_what_it_logs_without_deepspeed(stage: int, seed, tmp_path) -> None:
    """Held by the log: losses, terms, drifts and the norm of the gradient, of four steps."""

    def run(name: str, **arguments: Any) -> list[dict[str, float]]:
        (folder := tmp_path / name).mkdir()
        todo = (seed, str(folder), arguments)
        return run_ranks(2, training.train_with, *todo, folder=folder)[0]["log"]

    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, **cases.PUT_AWAY},
        "zero_allow_untested_optimizer": True,
    }
    for plain, spread in zip(run("plain"), run("zero", deepspeed=config), strict=True):
        assert plain["safety/max_drift"] > 0 or plain["step"] == 1
        for name, value in plain.items():
            assert spread[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name
