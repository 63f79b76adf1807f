"""The Triton row step by itself: called directly, and compiled for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import PENALTY_WEIGHT, Case, make_case
from tolerance import Sizes, compare, parts_of

import str_kernels
from str_kernels.contracts import RowOptions, RowStep, RowTerms
from str_kernels.rows_torch import row_step_torch

triton = pytest.importorskip("triton", reason="an optional dependency outside Linux")
from str_kernels.rows_triton import block_sizes, row_step_triton  # noqa: E402

STEPS = [row_step_torch, row_step_triton]


def arguments(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    logits = case.leaves["logits"].to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    softcap = case.options["softcap"] or 0.0
    return {
        "logits": logits,
        "target": case.target,
        "safety_ids": case.ids,
        "safety_logits": None,
        "ref": case.ref.to(wide),
        "id_weights": case.options["penalty"].id_weights.to(wide),
        "options": RowOptions(-100, case.options["logit_scale"], softcap),
    }


def scales(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    kept = (case.target != -100).to(wide)
    penalty_scale = PENALTY_WEIGHT * case.options["safety_row_weight"].to(wide)
    return {
        "ce_scale": kept * case.options["ce_row_weight"].to(wide),
        "penalty_scale": penalty_scale,
    }


def row_case(rng, device, **options) -> Case:
    weights = {"safety_rows": "weights", "ce_rows": "weights", "id_weights": True}
    case = make_case(rng, device, rows=5, vocab=4200, ids=20, **weights, **options)
    case.target[3] = -100
    return case


def gradient_of_two_passes(step: RowStep, case: Case, dtype: torch.dtype) -> torch.Tensor:
    given = arguments(case, dtype)
    norm = step(**given).norm
    grad = torch.full_like(given["logits"], torch.nan)
    step(**given, norm=norm, grad=grad, **scales(case, dtype))
    return grad


@pytest.mark.gpu
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("transform", ["none", "scale+cap"])
def test_the_terms_of_a_row(step, transform, rng, device) -> None:
    """Every row has its penalty and drift, ignored or not; the reader leaves out what is off."""
    case = row_case(rng, device, transform=transform)
    terms, truth = (
        step(**arguments(case, torch.float32)),
        row_step_torch(**arguments(case, torch.float64)),
    )
    ignored = case.target == -100
    assert ignored.any() and not terms.ce[ignored].any() and terms.penalty[ignored].all()
    for name in ("ce", "penalty", "drift"):
        mine, wanted = getattr(terms, name), getattr(truth, name)
        assert mine.shape == (5,) and mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), wanted, rtol=2e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("transform", ["none", "scale+cap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["one pass", "one pass in place", "two passes", "two in place"])
def test_the_ways_to_the_gradient_agree(step, transform, dtype, how, rng, device) -> None:
    """Terms first and gradient later, both at once, into new memory or over the logits."""
    case = row_case(rng, device, transform=transform, dtype=dtype)
    given = arguments(case, dtype)
    given["logits"] = given["logits"].clone()
    norm = step(**given).norm if "two" in how else None
    grad = given["logits"]
    if "place" not in how:
        grad = torch.full_like(grad, torch.nan)
    untouched = given["logits"].clone()
    step(**given, norm=norm, grad=grad, **scales(case, dtype))
    if "place" not in how:
        assert torch.equal(given["logits"], untouched)
    truth = gradient_of_two_passes(row_step_torch, case, torch.float64)
    same = gradient_of_two_passes(row_step_torch, case, dtype)
    factor = 4 if dtype == torch.bfloat16 and step is row_step_triton else 2  # see tolerance.py
    compare(how, grad, truth, same, parts_of(case, "logits"), Sizes(addend=12.0), factor=factor)


@pytest.mark.gpu
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("vocab", [100, 4096, 4200])
def test_nothing_outside_the_rows_is_read_or_written(step, vocab, rng, device) -> None:
    """The rows lie in a field of NaN, which no result may show and no write may change."""
    case = make_case(rng, device, rows=3, vocab=vocab, id_weights=True)
    given = arguments(case, torch.float32)
    field = torch.full((5, vocab + 7), torch.nan, device=device)
    field[1:4, 3 : 3 + vocab] = given["logits"]
    logits = field[1:4, 3 : 3 + vocab]
    per_row = {
        "ce_scale": torch.ones(3, device=device),
        "penalty_scale": torch.ones(3, device=device),
    }
    alone = given["logits"].clone()
    step(**{**given, "logits": alone}, grad=alone, **per_row)
    terms: RowTerms = step(**{**given, "logits": logits}, grad=logits, **per_row)
    assert not any(x.isnan().any() for x in terms)
    assert torch.equal(logits, alone)
    field[1:4, 3 : 3 + vocab] = torch.nan
    assert field.isnan().all()


@pytest.mark.parametrize(
    ("vocab", "ids", "sizes"),
    [
        (1, 0, (128, 16, 4)),
        (129, 17, (256, 32, 4)),
        (4096, 256, (4096, 256, 8)),
        (151936, 500, (4096, 256, 8)),
    ],
)
def test_block_sizes(vocab: int, ids: int, sizes: tuple[int, int, int]) -> None:
    assert block_sizes(vocab, ids) == sizes


# Compiled without a GPU. 128256 is Llama 3's vocabulary, a multiple of 16; 50257 is GPT-2's, odd.
VARIANTS = [
    {"path": path, "dtype": dtype, "cap": cap, "vocab": vocab, "ids": ids}
    for path, dtype, cap, vocab, ids in [
        ("linear", "bfloat16", False, 128256, 64),
        ("linear", "bfloat16", True, 128256, 500),
        ("linear", "float32", True, 128256, 64),
        ("forward", "bfloat16", False, 128256, 64),
        ("backward", "bfloat16", False, 128256, 64),
        ("backward", "float32", True, 128256, 64),
        ("backward", "bfloat16", False, 50257, 64),
        ("linear", "float16", False, 128256, 0),
    ]
]


def compile_for(arch: str, variants: list[dict[str, Any]]) -> list[dict[str, Any]]:
    program = Path(__file__).with_name("compile_kernel.py")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(str_kernels.__file__).parents[1])
    variants = [{**variant, "arch": arch} for variant in variants]
    run = subprocess.run(
        [sys.executable, program, json.dumps(variants)], capture_output=True, text=True, env=env
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def stores_are_ordered(order: str) -> bool:
    """Say whether a barrier stands between the row's stores and those of the safety columns.

    S is a wide store, of the row; s a narrow one, of a safety column; b a barrier.
    """
    return re.search(r"S[^Ss]*b[^Ss]*s[^S]*$", order) is not None


@pytest.mark.parametrize("arch", ["90", "gfx942"])
@pytest.mark.skipif(
    importlib.util.find_spec("triton.backends.nvidia") is None
    or importlib.util.find_spec("triton.backends.amd") is None,
    reason="this build of Triton lacks the compiler for one of the two makers",
)
def test_compiled_for_a_gpu_that_is_not_here(arch: str) -> None:
    spoilt = [{**VARIANTS[0], "without": "barrier"}, {**VARIANTS[0], "without": "int64"}]
    *results, no_barrier, narrow = compile_for(arch, [*VARIANTS, *spoilt])
    for variant, result in zip(VARIANTS, results, strict=True):
        assert len(result["spills"]) >= 2 and not any(result["spills"].values()), (variant, result)
        assert result["narrow_products"] == [], "an index of a large tensor would overflow int32"
        if variant["vocab"] % 16 == 0:
            stores = variant["path"] != "forward"
            assert result["wide"]["loads"] > 0, (variant, result)
            assert (result["wide"]["stores"] > 0) == stores, (variant, result)
            if stores and variant["ids"]:
                assert stores_are_ordered(result["order"]), (variant, result["order"])
    # and the checks can fail
    assert not stores_are_ordered(no_barrier["order"])
    assert narrow["narrow_products"] != []
    assert 0 < results[0]["registers"] <= 255
