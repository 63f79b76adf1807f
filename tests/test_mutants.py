"""Row steps with one line spoilt: the comparison that the other tests make must notice each.

A mutant is the module's source with one piece of text replaced, loaded as a module of its own. It
runs inside the real ops, on a case with all options, and is judged by the real tolerance rule. Only
OutOfTolerance counts as caught: a crash would prove nothing.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cases import Case, Result, make_case
from tolerance import OutOfTolerance, assert_matches_truth, parts_of

import str_kernels
from str_kernels import autograd

pytestmark = pytest.mark.gpu

# module, what is spoilt, text, its replacement. The first five of each module are the ones of
# docs/loss.md; its fifth, the z-loss's correction of the softmax, is not there yet, and the running
# rescale of the sum (in torch the shift by the maximum) stands in.
MUTANTS = [
    ("rows_triton", "the target term", "tl.where(offs_v == y, p - 1.0, p)", "p"),
    ("rows_triton", "the S-lane of y", "tl.where(s == y, p_s - 1.0, p_s)", "p_s"),
    ("rows_triton", "1/K in the gradient", "(2.0 * inv_k)", "2.0"),
    ("rows_triton", "the rescale of d", "d * tl.exp(m - safe) +", "d +"),
    ("rows_triton", "0.1 % of d", "log_d = tl.log(d)", "log_d = tl.log(d * 1.001)"),
    ("rows_triton", "1/K in the value", "penalty * inv_k", "penalty"),
    (
        "rows_triton",
        "the padding under a cap",
        'z = tl.where(offs_v < V, z, float("-inf"))',
        "pass",
    ),
    (
        "rows_triton",
        "the last nine columns",  # one alone may be a safety id, which is written again
        "element_ty), mask=mask_v)",
        "element_ty), mask=offs_v<V-9)",
    ),
    ("rows_triton", "the second block of ids", "offs_k = start + tl.arange", "offs_k = tl.arange"),
    (
        "rows_torch",
        "the target term",
        "grad[row, column.squeeze(1)] =",
        "_ =",
    ),
    ("rows_torch", "the S-lane of y", "p_s - is_target", "p_s"),
    ("rows_torch", "1/K in the gradient", "(2 / ids)", "2"),
    ("rows_torch", "the shift by the maximum", "log_total - (z_y - top)", "log_total - z_y"),
    ("rows_torch", "0.1 % of the sum", "torch.log(total,", "torch.log(total * 1.001,"),
    ("rows_torch", "1/K in the value", ".sum(dim=1) / max(ids, 1)", ".sum(dim=1)"),
    (
        "rows_torch",
        "the last block of rows",
        "range(0, rows, n_block)",
        "range(0, rows - n_block + 1, n_block)",
    ),
]
# These stand in more than one place, all of which are spoilt.
PLACES = {"offs_k = start + tl.arange": 2}


def load(module: str, folder: Path, replace: tuple[str, str] | None = None) -> ModuleType:
    source = (Path(str_kernels.__file__).parent / f"{module}.py").read_text(encoding="utf-8")
    if replace is not None:
        old, new = replace
        assert source.count(old) == PLACES.get(old, 1), f"{old!r} is in {source.count(old)} places"
        source = source.replace(old, new)
    path = folder / f"{module}_mutant.py"  # Triton reads a kernel's source from its file
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"str_kernels.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = mutant
    try:
        spec.loader.exec_module(mutant)
    finally:
        del sys.modules[spec.name]
    return mutant


def judge(case: Case, mutant: ModuleType, monkeypatch) -> None:
    name = mutant.__name__.removeprefix("str_kernels.").removesuffix("_mutant")
    step = getattr(mutant, name.replace("rows", "row_step"))
    monkeypatch.setattr(autograd, "row_step_of", lambda backend: step)
    backend = name.removeprefix("rows_")
    assert_matches_truth(case, case.run(backend), backend)


def case_of(path: str, module: str, transform: str, rng, device) -> Case:
    """All options, several blocks of everything; three rows in the interpreter, 70 in torch."""
    options = {"safety_rows": "weights", "ce_rows": "weights", "id_weights": True, "ids": 300}
    rows = 70 if module == "rows_torch" else 4
    case = make_case(
        rng, device, path=path, rows=rows, vocab=8201, transform=transform, ref="row", **options
    )
    # The second block of V has the larger logits, so that the running maximum moves there.
    leaf = case.leaves["logits"].t() if path == "logits" else case.leaves["linear_weight"]
    leaf[4096:] *= 1.5
    # Row 2, whose target is a safety id, takes part in both sums.
    for name in ("safety_row_weight", "ce_row_weight"):
        case.options[name][2] = 1.0
    return case


@pytest.mark.parametrize("path", ["logits", "linear"])
@pytest.mark.parametrize(
    ("module", "what", "old", "new"), MUTANTS, ids=[f"{m}-{what}" for m, what, *_ in MUTANTS]
)
def test_a_mutant_is_caught(module, what, old, new, path, rng, device, tmp_path, monkeypatch):
    mutant = load(module, tmp_path, (old, new))
    transform = "scale+cap" if "cap" in what else "none"
    with pytest.raises(OutOfTolerance):
        judge(case_of(path, module, transform, rng, device), mutant, monkeypatch)


@pytest.mark.parametrize("path", ["logits", "linear"])
@pytest.mark.parametrize("module", ["rows_triton", "rows_torch"])
def test_the_unspoilt_module_passes(module, path, rng, device, tmp_path, monkeypatch) -> None:
    unspoilt = load(module, tmp_path)
    for transform in ("none", "scale+cap"):
        judge(case_of(path, module, transform, rng, device), unspoilt, monkeypatch)


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
    for name, value in result.terms._asdict().items():
        # Drift and penalty are made of z_S - r, which is much smaller than z_S and r.
        more = 1 if name in ("loss", "ce") else 20
        terms = result.terms._replace(**{name: value * (1 + more * NOTICED[dtype, path])})
        with pytest.raises(OutOfTolerance, match=f"^{name}: "):
            assert_matches_truth(case, Result(terms, result.grads), "torch")


def test_text_that_is_not_there_is_noticed(tmp_path) -> None:
    with pytest.raises(AssertionError, match="in 0 places"):
        load("rows_torch", tmp_path, ("no such line", ""))


def test_a_mutant_runs_in_place_of_the_real_step(rng, device, tmp_path, monkeypatch) -> None:
    """Else every mutant would pass for the real one, or the real one for every mutant."""
    mutant = load("rows_torch", tmp_path, ("rows, vocab = logits.shape", "raise KeyError('ran')"))
    with pytest.raises(KeyError, match="ran"):
        judge(make_case(rng, device), mutant, monkeypatch)
    assert torch.is_tensor(make_case(rng, device).loss({"logits": torch.zeros(7, 301)}, "eager").ce)
