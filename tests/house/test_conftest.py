"""The test bench itself: what conftest promises holds, or the other tests mean nothing."""

from __future__ import annotations

import ast
import os
import types
from pathlib import Path

import pytest
import torch
from cases import SEED_VARIABLE, generator_of

TESTS = Path(__file__).parents[1]
PACKAGE = TESTS.parent / "str_kernels"
# Every way by which a tensor with unset contents can be had.
UNSET = {"empty", "empty_like", "new_empty", "empty_strided", "empty_permuted", "new_empty_strided"}
UNSET |= {"resize_", "resize_as_", "set_", "empty_quantized"}


# As if it were a module of the package, whose allocations alone are poisoned.
PRETEND = """
import torch

def by_empty(like): return torch.empty(4, 3, dtype=like.dtype)
def by_empty_like(like): return torch.empty_like(like)
def by_new_empty(like): return like.new_empty((4, 3))
def by_new_empty_in_another_dtype(like): return like.new_empty(4, 3, dtype=torch.float64)

@torch.library.custom_op("str_kernels_tests::forgets_to_write", mutates_args=())
def forgets_to_write(like: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(like)
    out[:1] = like[:1]
    return out
"""


@pytest.fixture(scope="module")
def pretend() -> types.ModuleType:
    module = types.ModuleType("str_kernels.pretend")
    exec(PRETEND, module.__dict__)
    return module


@pytest.mark.parametrize("how", ["empty", "empty_like", "new_empty", "new_empty_in_another_dtype"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unwritten_memory_is_nan(how, dtype, pretend) -> None:
    assert getattr(pretend, f"by_{how}")(torch.ones(4, 3, dtype=dtype)).isnan().all()


def test_unwritten_memory_is_nan_inside_a_custom_op(pretend) -> None:
    out = pretend.forgets_to_write(torch.ones(3, requires_grad=True))
    assert out[0] == 1 and out[1:].isnan().all()


def test_unwritten_indices_are_out_of_any_range(pretend) -> None:
    indices = pretend.by_empty_like(torch.ones(3, dtype=torch.int64))
    assert (indices == torch.iinfo(torch.int64).max).all()


def test_the_poison_is_for_the_package_alone(pretend) -> None:
    exec(PRETEND.partition("@")[0], other := {"__name__": "transformers"})
    like, zeros = torch.ones(4, 3), torch.zeros(4, 3)
    del zeros  # its memory is what the next tensor of this size finds
    assert not other["by_empty"](like).isnan().all()


def test_clean_memory_switches_the_poison_off(clean_memory) -> None:
    assert "allocate_and_poison" not in repr([torch.empty, torch.Tensor.new_empty])


def test_the_package_allocates_only_by_what_is_poisoned() -> None:
    used = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in UNSET:
                used.add(node.attr)
    assert used <= {"empty", "empty_like", "new_empty"}
    assert used, "the scan finds nothing: it is broken"


def test_inputs_depend_on_the_seed_and_on_the_test_and_on_nothing_else(request, rng) -> None:
    def draw(generator: torch.Generator) -> torch.Tensor:
        return torch.rand(4, generator=generator)

    seed = os.environ[SEED_VARIABLE]
    mine = draw(rng)
    assert torch.equal(mine, draw(generator_of(seed, request.node.nodeid)))
    assert not torch.equal(mine, draw(generator_of(seed, "another test")))
    assert not torch.equal(mine, draw(generator_of(seed + "1", request.node.nodeid)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels run where there is a GPU")
def test_kernels_are_interpreted_without_a_gpu() -> None:
    import triton

    assert triton.knobs.runtime.interpret
    assert torch.get_num_threads() == 1
