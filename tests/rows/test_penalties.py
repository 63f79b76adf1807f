"""Every kind of penalty: value and gradient against the truth, and what sets each kind apart.

Sizes: vocabulary 37 (less than a block), 301 (past a load of 16, prime to it), 4100 (one Triton
block of 4096 and a ragged second one); ids 1 (no spread within a row), 3, 20 (past the smallest
block of 16).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DTYPES, EXTRAS, KINDS, PATHS, WEIGHTS, make_case, pairwise
from third_statement import row_terms
from tolerance import OutOfTolerance, assert_matches_truth, row_weights

from str_kernels import SafetyPenalty
from str_kernels.op import backends

pytestmark = pytest.mark.gpu

BACKENDS = ["eager", "torch", "triton"]
OURS = ["torch", "triton"]
# Twice float32: smoothing and z-loss are too small to be seen behind a rounding to 16 bits.
RUNS = [f"{b}-{d}" for b in OURS for d in DTYPES if (b, d) != ("triton", "fp64")]
OPTIONS: dict[str, list[Any]] = {
    "run": RUNS,
    "kind": list(KINDS),
    "path": PATHS,
    "vocab": [37, 301, 4100],
    "ids": [1, 3, 20],
    "transform": ["none", "scale+cap"],
    "ref": ["row", "shared"],
    "safety_rows": ["default", "weights"],
    "ce_rows": ["default", "weights"],
    "id_weights": [False, True],
    "counts": ["default", "numbers"],
    "reduction": ["mean", "sum", "none"],
    "label_smoothing": [0.0, 0.1],
    "z_loss_weight": [0.0, 0.02],
    "metrics": [False, True],
    "pack_rows": [None, True, False],
}
COMBINATIONS = list(pairwise(OPTIONS, lambda row: True))


def skip_without(backend: str, device: torch.device) -> None:
    if missing := backends.missing_for(backend, device, torch.float32):
        pytest.skip(f"{backend}: {missing}")


@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_pair_of_options(options: dict[str, Any], rng, device) -> None:
    options = dict(options)
    backend, dtype = options.pop("run").split("-")
    case = make_case(rng, device, dtype=DTYPES[dtype], **options)
    if case.linear:  # chunks of three rows of seven
        row_bytes = -(-options["vocab"] // 16) * 16 * case.dtype.itemsize
        case = case.with_options(chunk_bytes=3 * row_bytes)
    assert_matches_truth(case, case.run(backend), backend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("backend", OURS)
def test_every_kind_in_float32_with_everything_on(kind, path, backend, rng, device) -> None:
    """The full product where it is judged most sharply."""
    skip_without(backend, device)
    case = make_case(rng, device, kind=kind, path=path, transform="cap", **WEIGHTS, **EXTRAS)
    assert_matches_truth(case, case.run(backend), backend)


# torch 2.13's inductor uses what torch deprecates
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("path", ["logits", "linear+lora"])
@pytest.mark.parametrize("extras", [{}, EXTRAS], ids=["plain", "everything"])
def test_every_kind_compiled(path, extras, rng, device, clean_memory) -> None:
    skip_without("compiled", device)
    for kind in KINDS:
        for reduction in ("mean", "none"):
            case = make_case(rng, device, kind=kind, path=path, reduction=reduction, **extras)
            assert_matches_truth(case, case.run("compiled"), "compiled")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["logits", "linear+bias", "linear+lora"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("transform", "ids", "more"), [("scale+cap", 5, EXTRAS), ("none", 0, {})])
def test_eager_is_the_third_statement(
    kind, path, reduction, transform, ids, more, rng, device
) -> None:
    """The truth against formulas made of torch's own losses and autograd, in float64."""
    options = {"dtype": torch.float64, "transform": transform, "reduction": reduction, "ids": ids}
    case = make_case(rng, device, kind=kind, path=path, **options, **WEIGHTS, **more)
    got = case.run("eager")
    leaves = case.live_leaves()
    rows = row_terms(case.changed(leaves=leaves))
    c, w = row_weights(case)
    ce, penalty = c * rows.ce, w * rows.penalty
    loss = ce + c * rows.z_loss + case.options["penalty"].weight * penalty
    drift = torch.where(w != 0, rows.drift, 0)
    if reduction == "mean":
        loss, ce, penalty, drift = loss.sum(), ce.sum(), penalty.sum(), drift.amax()
    loss.backward(case.cotangent(loss))
    close = {"rtol": 1e-11, "atol": 1e-13}
    wanted = {"loss": loss, "ce": ce, "penalty": penalty, "max_drift": drift}
    for name, value in wanted.items():
        torch.testing.assert_close(getattr(got.terms, name), value.detach(), **close)
    for name, leaf in leaves.items():
        torch.testing.assert_close(got.grads[name], leaf.grad, **close)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize(
    ("path", "reduction"), [("logits", "none"), ("linear+lora", "none"), ("linear+bias", "mean")]
)
def test_gradcheck(kind, backend, path, reduction, rng, device) -> None:
    sizes = {"rows": 4, "vocab": 9, "ids": 3, "dim": 3, "rank": 2, "dtype": torch.float64}
    options = {"transform": "scale+cap", "label_smoothing": 0.2, "z_loss_weight": 0.3, **WEIGHTS}
    case = make_case(rng, device, path=path, kind=kind, reduction=reduction, **sizes, **options)
    assert torch.autograd.gradcheck(*case.as_function(backend))


@pytest.mark.parametrize(
    "name", ["label_smoothing", "z_loss_weight", "temperature", "delta", "id_weights", "weight"]
)
@pytest.mark.parametrize("path", ["logits", "linear"])
def test_an_option_off_by_a_thousandth_is_noticed(name, path, rng, device) -> None:
    """In float32; the comparison above would show nothing if it could not see this."""
    kind = {"temperature": "subset_kl", "delta": "huber"}.get(name, "mse")
    case = make_case(rng, device, path=path, kind=kind, id_weights=True, **EXTRAS)
    penalty, options = case.options["penalty"], {}
    if name in case.options:
        options[name] = case.options[name] * 1.001
    else:
        given = {**vars(penalty), name: getattr(penalty, name) * 1.001}
        options["penalty"] = SafetyPenalty(**given)
    with pytest.raises(OutOfTolerance):
        assert_matches_truth(case, case.with_options(**options).run("torch"), "torch")
