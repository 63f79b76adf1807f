"""attach() on several ranks: the loss and every gradient are those of one process.

Gloo ranks on this machine, started once for each number of them; distributed_cases.py is what runs
there. Each rank trains a step alone too, and compares.
"""

from __future__ import annotations

from typing import Any

import distributed_cases as cases
import pytest
import torch.distributed as dist
from distributed_calls import PRELOADED, REFUSED, calls
from ranks import run_ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed package")

LOSS, GRADIENTS = 2e-5, 1e-4  # as in docs/support.md, and a tenth of what is granted there


NAMES = [(ranks, name) for ranks in (2, 4) for name in calls(ranks, 0, "") if name not in REFUSED]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank found, by the number of ranks."""
    results = {}
    for ranks in (2, 4):
        folder = tmp_path_factory.mktemp("ranks")
        todo = calls(ranks, 11, str(folder))
        results[ranks] = run_ranks(ranks, cases.run_all, todo, folder=folder, preload=PRELOADED)
    return results


# What older releases of transformers say of tensor parallelism.
ABSENT = {
    "unexpected keyword argument 'tp_size'": "has no DistributedConfig(tp_size=)",
    "No module named 'transformers.distributed.tensor_parallel'": "has no tensor parallelism",
    "no attribute '_expand_parallel_plan'": "spreads a model in another way",
    "must be divisible by the tensor parallel size": "wants a vocabulary that ranks divide",
}


def skip_where_absent(found: Any) -> None:
    for text, reason in ABSENT.items():
        if isinstance(found, str) and text in found:
            pytest.skip(f"this transformers {reason}")


@pytest.mark.parametrize(("ranks", "name"), NAMES)
def test_a_step_equals_that_of_one_process(ranks: int, name: str, found) -> None:
    for of_rank in found[ranks]:
        errors = of_rank[name]
        skip_where_absent(errors)
        assert isinstance(errors, dict), errors
        assert errors["loss"] <= LOSS and errors["gradients"] <= GRADIENTS
        assert errors.get("equal", True)  # the loss, in every bit
        if name in ("tensor parallel lora", "tensor parallel logits lora"):
            assert errors["penalty at first"] == 0.0


def test_what_is_refused(found) -> None:
    for of_rank in found[2]:
        said = of_rank["refusals"]
        for name, argument in (("attached after", "model"), ("a ref_model after", "ref_model")):
            text = f"`{argument}` must be given to attach() before fully_shard(); got one that is"
            assert said[f"{name} fully_shard"].startswith(text)
        assert "DistributedDataParallel" in said["attached after DDP"]
        assert said["spread since"].startswith("`model` must have its head in one unit")


def test_a_lora_on_a_tensor_parallel_head_is_refused(found) -> None:
    for of_rank in found[2]:
        said = of_rank["lora on the head"]
        skip_where_absent(said)
        assert "must have no LoRA on a head that is tensor parallel" in said
