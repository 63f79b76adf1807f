"""A row step called directly, and its results held against float64 by the rule of tolerance.py."""

from __future__ import annotations

from typing import Any

import torch
from cases import EXTRAS, PENALTY_WEIGHT, WEIGHTS, Case, make_case
from tolerance import FACTOR, FACTOR_TRUNCATED, Sizes, compare, interpreted, parts_of

from str_kernels.op.contracts import RowOptions, RowStep, RowTerms
from str_kernels.op.rows.rows_torch import row_step_torch

EVERYTHING = {"transform": "scale+cap", **EXTRAS}


def arguments(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    logits = case.leaves["logits"].to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    given, penalty = case.options, case.options["penalty"]
    a = penalty.id_weights
    options = RowOptions(
        logit_scale=given["logit_scale"],
        softcap=given["softcap"] or 0.0,
        label_smoothing=given["label_smoothing"],
        z_loss_weight=given["z_loss_weight"],
        kind=penalty.kind,
        temperature=penalty.temperature,
        delta=penalty.delta,
        metrics=given["metrics"],
    )
    return {
        "logits": logits.clone(),
        "target": case.target,
        "safety_ids": case.ids,
        "safety_logits": None,
        "ref": case.ref.to(wide),
        "id_weights": (case.ref.new_ones(len(case.ids)) if a is None else a).to(wide),
        "options": options,
    }


def scales(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    kept = (case.target != -100).to(wide)
    penalty_scale = PENALTY_WEIGHT * case.options["safety_row_weight"].to(wide)
    return {
        "ce_scale": kept * case.options["ce_row_weight"].to(wide),
        "penalty_scale": penalty_scale,
    }


def row_case(rng, device, vocab: int = 4200, **options) -> Case:
    case = make_case(rng, device, rows=5, vocab=vocab, ids=20, **WEIGHTS, **options)
    case.target[3] = -100
    return case


def gradient_of_two_passes(step: RowStep, case: Case, dtype: torch.dtype) -> torch.Tensor:
    given = arguments(case, dtype)
    norm = step(**given).norm
    grad = torch.full_like(given["logits"], torch.nan)
    step(**given, norm=norm, grad=grad, **scales(case, dtype))
    return grad


def factor_for(step: RowStep, dtype: torch.dtype) -> float:
    """Return the rule's factor for a row step, see tolerance.py."""
    cut_off = dtype == torch.bfloat16 and interpreted() and step != row_step_torch
    return FACTOR_TRUNCATED if cut_off else FACTOR


def compare_terms(case: Case, terms: RowTerms, first: int | None = None) -> None:
    """Hold float32 terms, of all rows or the first few, against row_step_torch's in float64."""
    truth = row_step_torch(**arguments(case, torch.float64))
    for name, mine in terms._asdict().items():
        wanted = getattr(truth, name)[..., :first]
        assert (mine.shape, mine.dtype) == (wanted.shape, torch.float32), name
        torch.testing.assert_close(mine.double(), wanted, rtol=3e-6, atol=3e-6, msg=name)


def compare_gradient(what: str, case: Case, grad: torch.Tensor, factor: float = FACTOR) -> None:
    """Hold the gradient, of all rows or the first few, by the rule."""
    n = grad.shape[0]
    truth = gradient_of_two_passes(row_step_torch, case, torch.float64)[:n]
    same = gradient_of_two_passes(row_step_torch, case, grad.dtype)[:n]
    parts = {name: mask[:n] for name, mask in parts_of(case, "logits").items()}
    compare(what, grad, truth, same, parts, Sizes(addend=12.0), factor=factor)
