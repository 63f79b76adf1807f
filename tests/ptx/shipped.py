"""The shipped codes: each specialisation that a user can get, at its vocabulary, as a case."""

from __future__ import annotations

import os
from typing import Any

import torch
from cases import Case, make_case
from row_steps import arguments, compare_gradient, compare_terms, scales

from bench.compiled import compile_report
from bench.compiled.compiling import TARGETS, Variant, launch_of, specialize
from bench.ptx.launcher import Execution, Settings, executing
from str_kernels.op.rows.rows_torch import row_step_torch
from str_kernels.op.rows.rows_triton import row_step_triton

TARGET = os.environ.get("STR_PTX", "")
ROWS = 2  # of one launch: that a block stays in its own row shows with two
EVERYTHING: dict[str, Any] = {
    "transform": "scale+cap",
    "label_smoothing": 0.1,
    "z_loss_weight": 1e-4,
    "metrics": True,
}


def codes(target: str, every: bool) -> dict[str, Variant]:
    """Return the codes of a target by their key; without `every` a sample of all kinds of them."""
    found: dict[str, Variant] = {}
    for variant in compile_report.every_variant() if every else compile_report.sample():
        if variant.target == target:
            code = specialize(launch_of(variant), TARGETS[target])
            found.setdefault(code.key, variant)
    return found


def portion_of(every: list[Any]) -> list[Any]:
    """Return those that STR_PTX_PORTION asks for: "2/40" is every 40th from the third on."""
    part, _, parts = os.environ.get("STR_PTX_PORTION", "0/1").partition("/")
    return every[int(part) :: int(parts)]


def case_of(variant: Variant, rng: torch.Generator) -> Case:
    dtype = getattr(torch, variant.dtype)
    weights = {"safety_rows": "weights", "ce_rows": "weights", "id_weights": True}
    options = EVERYTHING if variant.everything else {}
    case = make_case(
        rng, torch.device("cpu"), rows=ROWS, vocab=variant.vocab, ids=variant.ids,
        dtype=dtype, kind=variant.kind, **weights, **options,
    )  # fmt: skip
    last = variant.vocab - 1  # in the last and shortest block
    # and one in the middle, which a thread of another warp than the first writes in the pass
    case.target[:] = torch.tensor([last, variant.vocab // 3])
    if case.ids is None:
        return case.changed(ids=case.target.new_empty(0), ref=torch.empty(ROWS, 0))
    if not len(case.ids):
        return case
    # A column that two threads write, of two warps where K > 32; with a pull that is more than the
    # rounding of 16 bits, or both would write the same.
    case.ids[case.ids == last] = case.ids[-1].clone()
    case.ids[-1] = last
    case.options["penalty"].id_weights[-1] = 2.0
    case.ref[0, -1] -= 8.0
    case.leaves["logits"][0, last] = case.leaves["logits"][0].max()  # probable, for every kind
    return case


def execute(
    variant: Variant, rng: torch.Generator, settings: Settings, *, in_place: bool = False
) -> Execution:
    """Run a code on its case, with the padding of our workspace where it has one, and judge it."""
    case = case_of(variant, rng)
    dtype = case.dtype
    given = arguments(case, dtype)
    width = -(-variant.vocab // 16) * 16 if variant.padded else variant.vocab
    field = torch.full((ROWS, width), torch.nan, dtype=dtype)
    logits = field[:, : variant.vocab]
    logits.copy_(given["logits"])
    given["logits"] = logits
    if variant.padded:  # as the linear path gives them: of float64 products, scaled and capped
        options = given["options"]
        z = logits[:, given["safety_ids"]].double() * options.logit_scale
        if options.softcap:
            z = options.softcap * torch.tanh(z / options.softcap)
        given["safety_logits"] = z.float()
    grad = None
    with executing(settings):
        if variant.path == "linear":
            grad = logits
            terms = row_step_triton(**given, grad=grad, **scales(case, dtype), padded=True)
        elif variant.path in ("evaluation", "forward"):
            terms = row_step_triton(**given, padded=variant.padded)
        else:
            norm = row_step_torch(**arguments(case, torch.float64)).norm.float()
            grad = logits if in_place else torch.full_like(logits, torch.nan)
            row_step_triton(**given, norm=norm, grad=grad, **scales(case, dtype))
    if variant.path != "backward":
        compare_terms(case, terms)
    if grad is not None:
        compare_gradient(str(variant), case, grad.clone())
    return settings.executions[0]
