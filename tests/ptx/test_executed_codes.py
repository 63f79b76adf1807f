"""Shipped codes, executed: each one's numbers, its races and its bits in any order of the warps.

Of a process whose kernels are not interpreted: test_ptx_in_ci.py runs a sample, `make ptx` all.
"""

from __future__ import annotations

import os

import pytest
import torch
from shipped import TARGET, codes, execute, portion_of

from bench.compiled.compiling import Variant
from bench.ptx.launcher import Settings
from str_kernels.op.rows import rows_triton

EVERY = os.environ.get("STR_PTX_CODES") == "every"
CODES = portion_of(list(codes(TARGET, EVERY).items()))
FEW = [code for code in CODES if code[1].vocab < 40000][::7]  # each is run six times more


def name(value: object) -> str:
    if not isinstance(value, Variant):
        return ""
    everything = "-everything" if value.everything else ""
    return f"{value.path}-{value.dtype}-{value.vocab}-{value.ids}-{value.kind}{everything}"


@pytest.mark.parametrize(("key", "variant"), CODES, ids=name)
def test_a_shipped_code_is_right(key: str, variant: Variant, rng: torch.Generator) -> None:
    """Against float64; every access in bounds, aligned and of what was written; no race."""
    execution = execute(variant, rng, Settings(target=TARGET))
    assert execution.code.key == key, "the launcher compiles other code for these arguments"


@pytest.mark.parametrize(("key", "variant"), FEW, ids=name)
def test_the_order_of_warps_changes_no_bit(
    key: str, variant: Variant, rng: torch.Generator
) -> None:
    state = rng.get_state()
    found = []
    for order in ("lockstep", "reversed", "random"):
        rng.set_state(state)
        settings = Settings(target=TARGET, order=order, seed=7)
        memory = execute(variant, rng, settings).machine.memory
        found.append(memory.bytes.copy())
    assert all((memory == found[0]).all() for memory in found[1:])


@pytest.mark.parametrize("noise", [1, -1, 7])
@pytest.mark.parametrize(("key", "variant"), FEW, ids=name)
def test_with_the_largest_errors_of_ex2_and_div(key, variant, noise, rng) -> None:
    execute(variant, rng, Settings(target=TARGET, noise=noise))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_columns_by_a_second_launch(dtype: str, rng: torch.Generator, monkeypatch) -> None:
    """As on AMD: the row's launch puts them aside, the next one writes them."""
    monkeypatch.setattr(rows_triton, "BARRIERS_HOLD_LOADS", False)
    settings = Settings(target=TARGET)
    execute(Variant("linear", dtype, 5008, 20, "mse", False, TARGET), rng, settings)
    assert [x.machine.program.name for x in settings.executions] == [
        "row_step_kernel",
        "scatter_kernel",
    ]
