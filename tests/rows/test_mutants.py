"""Row steps with one line spoilt: the comparison that the other tests make must notice each.

A mutant is the module's source with one piece changed, loaded as a module of its own. It runs
inside the real ops, on a case with all options, and is judged by the real tolerance rule. Only
OutOfTolerance counts as caught: a crash would prove nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from cases import Case, Result, make_case
from spoilt_source import Change, changed, load_changed
from tolerance import OutOfTolerance, assert_matches_truth, parts_of

from str_kernels.op import autograd, chunks
from str_kernels.op.penalties import KINDS
from str_kernels.op.rows import rows_torch

pytestmark = pytest.mark.gpu


class Mutant(NamedTuple):
    module: str
    what: str
    old: str
    new: str
    options: dict[str, Any] = {}  # noqa: RUF012 - of make_case, read only
    inside: str = ""

    def __str__(self) -> str:
        return f"{self.module}-{self.what}"


CAP = {"transform": "scale+cap"}
SMOOTH = {"label_smoothing": 0.2}
Z_LOSS = {"z_loss_weight": 0.01}
METRICS = {"metrics": True}
LOGPROB = {"kind": "logprob"}
COARSE = {"kind": "coarse_kl", "vocab": 23, "ids": 6}  # so few that the ids have a share

# The first five of each step are the ones of docs/loss.md.
MUTANTS = [
    Mutant("row_kernel", "the target term", "tl.where(is_y, p - 1.0 + smoothing, p)", "p"),
    Mutant("row_kernel", "the S-lane of y", "s == y", "s < 0", inside="row_step_kernel"),
    Mutant("penalty_kernel", "1/K", "a = a * inv_k", "pass"),
    Mutant(
        "row_kernel",
        "the z-loss's correction of the softmax",
        "ce_scale * (2.0 * z_loss_weight * lse)",
        "0.0",
        Z_LOSS,
    ),
    Mutant("row_kernel", "0.1 % of d", "part * shrink", "1.001 * part * shrink"),
    Mutant("row_kernel", "the rescale of d", "d * shrink", "d"),
    Mutant("row_kernel", "the rescale of the threads' d", "part * shrink", "part"),
    Mutant(
        "row_kernel", "what is beyond the row", 'x = tl.where(inside, x, float("-inf"))', "pass"
    ),
    Mutant(
        "row_kernel",
        "what is beyond the row, under a cap",
        'x = tl.where(inside, x, float("-inf"))',
        "pass",
        CAP,
    ),
    # one alone may be a safety id, which is written again
    Mutant("row_kernel", "the last nine columns", "at < v_padded", "at < V - 9"),
    Mutant("row_kernel", "the last id", "mask_k = offs_k < K", "mask_k = offs_k < K - 1"),
    Mutant(
        "penalty_kernel",
        "the slope of huber",
        "slope = a * x",
        "slope = a * drift",
        {"kind": "huber"},
    ),
    Mutant("penalty_kernel", "the side of hinge", "drift > 0.0", "drift < 0.0", {"kind": "hinge"}),
    Mutant(
        "penalty_kernel",
        "the weights of centered's mean",
        "masked_sum(a * drift, mask_k) / masked_sum(a, mask_k)",
        "masked_sum(drift, mask_k) / tl.sum(tl.where(mask_k, 1.0, 0.0), 0)",
        {"kind": "centered"},
    ),
    Mutant(
        "row_kernel", "logprob's pull on every token", "extra -= tl.sum(pull, 0)", "pass", LOGPROB
    ),
    Mutant(
        "penalty_kernel",
        "the rest",
        "ref_rest * tl.log(ratio)",
        "0.9 * ref_rest * tl.log(ratio)",
        COARSE,
    ),
    Mutant("penalty_kernel", "lse in logprob", "z_s - lse - r", "z_s - 0.9 * lse - r", LOGPROB),
    Mutant(
        "penalty_kernel",
        "subset_kl's T in the slope",
        "temperature * (tl.exp(log_s) - q)",
        "tl.exp(log_s) - q",
        {"kind": "subset_kl"},
    ),
    Mutant("row_kernel", "the smoothing at y", "p - 1.0 + smoothing", "p - 1.0", SMOOTH),
    Mutant("row_kernel", "the smoothing elsewhere", "of_ce * (smoothing * inv_v)", "0.0", SMOOTH),
    Mutant(
        "row_kernel",
        "the smoothing at the ids",
        "smoothing * inv_v",
        "0.0",
        SMOOTH,
        inside="_column",
    ),
    Mutant("row_kernel", "the mean in the loss", "smoothing * smooth", "0.0", SMOOTH),
    Mutant(
        "row_kernel", "the entropy's rescale", "plogp + moved", "plogp", METRICS, inside="_online"
    ),
    Mutant(
        "row_kernel",
        "the threads' entropies",
        "shrink * (plogp + moved)",
        "plogp",
        METRICS,
        inside="row_step_kernel",
    ),
    Mutant("row_kernel", "the slope of the cap", "du *= 1.0 - x * x", "pass", CAP),
    Mutant("rows_torch", "the target term", "grad[row, column]", "_"),
    Mutant(
        "rows_torch",
        "the S-lane of y",
        "safety_ids == target.unsqueeze(1)",
        "-1 == target.unsqueeze(1)",
    ),
    Mutant("penalties", "1/K in the slope", "self.a / max(self.a.shape[0], 1)", "self.a"),
    Mutant(
        "rows_torch",
        "the z-loss's correction of the softmax",
        "per_lse = 2 * options.z_loss_weight * ce_scale",
        "pass",
        Z_LOSS,
    ),
    Mutant("rows_torch", "0.1 % of the sum", "z.exp_().sum(dim=1)", "z.exp_().sum(dim=1) * 1.001"),
    Mutant("rows_torch", "the shift by the maximum", "log_total - (z_y - top)", "log_total - z_y"),
    Mutant(
        "rows_torch",
        "the last block of rows",
        "range(0, rows, n_block)",
        "range(0, rows - n_block + 1, n_block)",
    ),
    Mutant(
        "rows_torch",
        "logprob's pull on every token",
        "at_0 = at_0 - _where_nonzero(share, of_0)",
        "pass",
        LOGPROB,
    ),
    Mutant(
        "rows_torch",
        "coarse_kl's pull on every token",
        "_where_nonzero(penalty_scale, pull)",
        "0 * _where_nonzero(penalty_scale, pull)",
        COARSE,
    ),
    Mutant(
        "rows_torch",
        "the smoothing elsewhere",
        "z.sub_(soft.flat.unsqueeze(1))",
        "z.sub(soft.flat.unsqueeze(1))",
        SMOOTH,
    ),
    Mutant("rows_torch", "the mean in the loss", "e * (log_total - wide.mean)", "0.0", SMOOTH),
    Mutant("penalties", "1/K in the value", "max(self.a.shape[0], 1)", "1", inside="mean"),
    Mutant(
        "penalties",
        "the factor of mse",
        "lambda s: 2 * s.share() * s.drift",
        "lambda s: s.share() * s.drift",
    ),
    Mutant(
        "penalties",
        "the slope of huber",
        "s.share() * _clipped(s)",
        "s.share() * s.drift",
        {"kind": "huber"},
    ),
    Mutant(
        "penalties",
        "the side of hinge",
        "s.drift.clamp(max=0.0)",
        "s.drift.clamp(min=0.0)",
        {"kind": "hinge"},
    ),
    Mutant(
        "penalties",
        "centered's mean",
        "(s.a * s.drift).sum(dim=1, keepdim=True)",
        "0 * s.drift",
        {"kind": "centered"},
    ),
    Mutant(
        "penalties",
        "T of subset_kl",
        "s.options.temperature * (log_s.exp() - log_q.exp())",
        "s.options.temperature**2 * (log_s.exp() - log_q.exp())",
        {"kind": "subset_kl"},
    ),
    Mutant("penalties", "the rest's value", "rest - ref_rest", "0.0", COARSE),
]


def load(module: str, folder: Path, change: Change | None = None) -> ModuleType:
    package = "str_kernels.op" if module == "penalties" else "str_kernels.op.rows"
    mutant = load_changed(f"{package}.{module}", folder, change)
    if module == "penalty_kernel":  # runs inside the other, which is loaded anew to find it
        with mock.patch.dict(sys.modules, {f"{package}.{module}": mutant}):
            return load("row_kernel", folder)
    return mutant


def judge(case: Case, mutant: ModuleType, monkeypatch) -> None:
    """Run the case with the mutant in place of the module it was made of."""
    backend = "torch"
    if "row_kernel" in mutant.__name__:
        rows_triton = pytest.importorskip("str_kernels.op.rows.rows_triton")
        monkeypatch.setattr(rows_triton, "row_step_kernel", mutant.row_step_kernel)
        backend = "triton"
    elif "rows_torch" in mutant.__name__:
        for module in (autograd, chunks):
            monkeypatch.setattr(module, "row_step_of", lambda backend: mutant.row_step_torch)
    else:
        for name in ("KINDS", "subset_of"):
            monkeypatch.setattr(rows_torch, name, getattr(mutant, name))
    assert_matches_truth(case, case.run(backend), backend)


def case_of(path: str, module: str, options: dict[str, Any], rng, device) -> Case:
    """Several blocks of everything; four rows in the interpreter, 70 in torch."""
    given = {"safety_rows": "weights", "ce_rows": "weights", "id_weights": True, "ids": 300}
    # A float32 row of up to 16,384 logits may be held whole; past that there are two passes.
    sizes = (
        {"rows": 4, "vocab": 16501} if module.endswith("_kernel") else {"rows": 70, "vocab": 8201}
    )
    case = make_case(rng, device, path=path, **{**sizes, **given, **options})
    # The second block of V has the larger logits, so that the running maximum moves there.
    leaf = case.leaves["logits"].t() if path == "logits" else case.leaves["linear_weight"]
    leaf[4096:] *= 1.5
    # Row 2, whose target is a safety id, takes part in both sums. No row is without a weight: the
    # linear path would pack it away, and the rest might fill their blocks, with none cut short.
    case.options["ce_row_weight"][2] = 1.0
    case.options["safety_row_weight"].clamp_(min=0.25)
    return case


@pytest.mark.parametrize("path", ["logits", "linear"])
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_mutant_is_caught(mutant, path, rng, device, tmp_path, monkeypatch):
    spoilt = load(mutant.module, tmp_path, Change(mutant.old, mutant.new, mutant.inside))
    with pytest.raises(OutOfTolerance):
        judge(case_of(path, mutant.module, mutant.options, rng, device), spoilt, monkeypatch)


ALL_OPTIONS = [{}, {**CAP, **SMOOTH, **Z_LOSS, **METRICS}, *({"kind": kind} for kind in KINDS)]


@pytest.mark.parametrize("path", ["logits", "linear"])
@pytest.mark.parametrize("module", ["row_kernel", "penalty_kernel", "rows_torch", "penalties"])
def test_the_unspoilt_module_passes(module, path, rng, device, tmp_path, monkeypatch) -> None:
    unspoilt = load(module, tmp_path)
    for options in ALL_OPTIONS:
        judge(case_of(path, module, options, rng, device), unspoilt, monkeypatch)


# A relative error of one element that the rule must notice, by dtype and path: three times what it
# allows. (On the linear path in 16 bits eager's own logits are rounded, and what the rule allows is
# relative to eager's error.)
NOTICED = {
    (torch.float32, "logits"): 6e-6,
    (torch.float32, "linear+bias"): 1e-5,
    (torch.bfloat16, "logits"): 3e-2,
    (torch.bfloat16, "linear+bias"): 1e-1,
    (torch.float16, "logits"): 3e-3,
    (torch.float16, "linear+bias"): 1e-2,
    (torch.float64, "logits"): 3e-14,
    (torch.float64, "linear+bias"): 6e-14,
}


@pytest.mark.parametrize(("dtype", "path"), NOTICED)
def test_an_error_in_one_element_is_noticed(dtype, path, rng, device) -> None:
    """In the largest element of each part of each gradient, and in each term."""
    case = make_case(rng, device, path=path, dtype=dtype, rows=12, vocab=301, ids=20)
    result = case.run("torch")
    assert_matches_truth(case, result, "torch")
    error = 1 + NOTICED[dtype, path]
    for name, grad in result.grads.items():
        for mask in parts_of(case, name).values():
            spoilt = grad.clone()
            mask = mask if mask.dim() == grad.dim() else mask.unsqueeze(1)
            where = torch.where(mask, grad.abs(), -1).argmax()
            spoilt.view(-1)[where] *= error
            grads = {**result.grads, name: spoilt}
            with pytest.raises(OutOfTolerance, match=f"grad of {name}, "):
                assert_matches_truth(case, Result(result.terms, grads), "torch")
    for name in ("loss", "ce", "penalty", "max_drift"):
        value = getattr(result.terms, name)
        # Drift and penalty are made of z_S - r, which is much smaller than z_S and r.
        more = 1 if name in ("loss", "ce") else 20
        terms = result.terms._replace(**{name: value * (1 + more * NOTICED[dtype, path])})
        with pytest.raises(OutOfTolerance, match=f"^{name}: "):
            assert_matches_truth(case, Result(terms, result.grads), "torch")


SOURCE = """
def f(x):
    y = (
        x * 2  # twice
    )
    stop(); stop()
    return y + (2 * x)

def g(x): return 2 * x
"""


@pytest.mark.parametrize(
    ("change", "there"),
    [
        (Change("(x) *2", "x * 3"), "y = x * 3\n"),
        (Change("2 * x", "0", inside="f"), "return y + 0\n"),
        (Change("x * 2", "x + 2"), "y = x + 2\n"),
        (Change("y", "z", inside="g"), None),
        (Change("y + 2", "0"), None),
        (Change("2 * x", "0"), None),  # in two places
        (Change("stop()", "pass"), None),
        (Change("stop()\nreturn y + 2 * x", "return y"), "stop()\n    return y\n"),
        (Change("y = x * 2\nreturn y + 2 * x", "pass"), None),  # not in a row
    ],
)
def test_a_change_is_made_in_one_place_or_refused(change: Change, there: str | None) -> None:
    if there is None:
        with pytest.raises(ValueError, match=r"`old` must be in one place; got [02] of"):
            changed(SOURCE, change)
    else:
        assert there in changed(SOURCE, change)
        before, after = (changed(SOURCE, one).splitlines() for one in (None, change))
        assert len([line for line in after if line not in before]) == 1


def test_a_mutant_runs_in_place_of_the_real_step(rng, device, tmp_path, monkeypatch) -> None:
    """Else every mutant would pass for the real one, or the real one for every mutant."""
    mutant = load(
        "rows_torch", tmp_path, Change("norm_known = norm is not None", "raise KeyError('ran')")
    )
    with pytest.raises(KeyError, match="ran"):
        judge(make_case(rng, device), mutant, monkeypatch)
    assert torch.is_tensor(make_case(rng, device).loss({"logits": torch.zeros(7, 301)}, "eager").ce)
