"""Both functions against float64 eager, over every pair of options, and a loss by hand.

Sizes, and why these:
- vocabulary 1 (softmax of one), 509 (one block of 512, ragged, prime: no vector load divides it),
  4096 (exactly one Triton block), 8208 (three blocks, the last of 16; rows divisible by 16, so that
  loads are 16 bytes wide), 9001 (three blocks, ragged, rows unaligned);
- ids 0 (plain cross-entropy by an empty set), 1, 3 (below the smallest block of 16), 64 (a block),
  500 (two blocks of 256, ragged), none (no set at all);
- rows 70 on torch: 2 MB of scratch hold 58 rows of 9001, so a second, ragged block of rows exists;
  7 on Triton: each row is a program of its own, and the interpreter is slow;
- chunks of 16 and 3 rows: the last one is ragged in both.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases import DTYPES, Case, make_case, pairwise
from tolerance import assert_matches_truth, assert_terms_match, compare, parts_of

from str_kernels import SafetyPenalty, safety_cross_entropy, safety_linear_cross_entropy
from str_kernels.op import autograd, chunks

pytestmark = pytest.mark.gpu

ROWS = {"torch": 70, "triton": 7}
CHUNK_ROWS = {"torch": 16, "triton": 3}
RUNS = [f"{b}-{d}" for b in ROWS for d in DTYPES if (b, d) != ("triton", "fp64")]
OPTIONS: dict[str, list[Any]] = {
    "path": ["logits", "linear", "linear+bias"],
    "vocab": [1, 509, 4096, 8208, 9001],
    "ids": [None, 0, 1, 3, 64, 500],
    "transform": ["none", "scale", "cap", "scale+cap"],
    "ref": ["row", "shared"],
    "ref_dtype": [torch.float32, torch.bfloat16],
    "safety_rows": ["default", "mask", "weights"],
    "ce_rows": ["default", "weights"],
    "id_weights": [False, True],
    "counts": ["default", "numbers", "tensors"],
    "reduction": ["mean", "sum"],
    "penalty_weight": ["number", "tensor"],
    "ignore_index": [-100, 0],  # 0 is a column too: then no target can be it
}


def possible(row: dict[str, Any]) -> bool:
    return (row["ids"] or 0) <= row["vocab"] and (row["ignore_index"], row["vocab"]) != (0, 1)


COMBINATIONS = list(pairwise({"run": RUNS, **OPTIONS}, possible))


def case_for(backend: str, dtype: torch.dtype, rng, device, rows=None, **options) -> Case:
    case = make_case(rng, device, dtype=dtype, rows=rows or ROWS[backend], **options)
    if case.linear:
        row_bytes = -(-options["vocab"] // 16) * 16 * dtype.itemsize
        case = case.with_options(chunk_bytes=CHUNK_ROWS[backend] * row_bytes)
    return case


@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_pair_of_options(options: dict[str, Any], rng, device) -> None:
    options = dict(options)
    backend, dtype = options.pop("run").split("-")
    case = case_for(backend, DTYPES[dtype], rng, device, **options)
    assert_matches_truth(case, case.run(backend), backend)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("path", OPTIONS["path"])
def test_options_drawn_anew_each_session(run: str, path: str, rng, device) -> None:
    def draw(levels: list[Any]) -> Any:
        return levels[int(torch.randint(len(levels), (), generator=rng))]

    backend, dtype = run.split("-")
    options = {name: draw(levels) for name, levels in OPTIONS.items()}
    while not possible(options):
        options = {name: draw(levels) for name, levels in OPTIONS.items()}
    options.update(path=path)
    case = case_for(backend, DTYPES[dtype], rng, device, **options)
    assert_matches_truth(case, case.run(backend), backend)


def test_every_pair_that_can_occur_does() -> None:
    factors = {"run": RUNS, **OPTIONS}
    for a, b in itertools.combinations(factors, 2):
        seen = {(row[a], row[b]) for row in COMBINATIONS}
        missing = set(itertools.product(factors[a], factors[b])) - seen
        impossible = {(v, k) for v in OPTIONS["vocab"] for k in OPTIONS["ids"] if (k or 0) > v}
        assert missing <= (impossible | {(1, 0)}), (a, b, missing)


@pytest.mark.parametrize("backend", ["eager", "torch", "triton"])
def test_a_loss_worked_out_by_hand(backend: str, device) -> None:
    # Two rows of p = (1/2, 1/4, 1/4); targets 0 and 2: ce = ln 2 and ln 4.
    # S = (1, 0), r = z_S - (1, 3): squares 1 and 9, id weights 2 and 1/3: (2 + 3) / 2 a row.
    u = torch.tensor([[2.0, 1.0, 1.0]] * 2, device=device) * torch.log(torch.tensor(2.0))
    u.requires_grad_()
    ids = torch.tensor([1, 0], device=device)
    ref = u.detach()[:, ids] - torch.tensor([1.0, 3.0], device=device)
    penalty = SafetyPenalty(weight=0.1, id_weights=torch.tensor([2.0, 1 / 3]))
    target = torch.tensor([0, 2], device=device)
    terms = safety_cross_entropy(u, target, ids, ref, penalty=penalty, backend=backend)
    terms.loss.backward()
    log2 = torch.log(torch.tensor(2.0, device=device))
    close = {"rtol": 3e-7, "atol": 1e-7, "check_device": False}  # some roundings of float32
    torch.testing.assert_close(terms.ce, 1.5 * log2, **close)
    torch.testing.assert_close(terms.penalty, torch.tensor(2.5), **close)
    torch.testing.assert_close(terms.loss, 1.5 * log2 + 0.25, **close)
    torch.testing.assert_close(terms.max_drift, torch.tensor(3.0), **close)
    # (p - onehot)/2 + 0.1/2 * 2/K a (z - r):  S_0 = column 1 gets 0.1, S_1 = column 0 gets 0.05
    wanted = [[-0.25 + 0.05, 0.125 + 0.1, 0.125], [0.25 + 0.05, 0.125 + 0.1, -0.375]]
    torch.testing.assert_close(u.grad, torch.tensor(wanted), **close)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_linear_path_is_the_logits_path(backend: str, rng, device) -> None:
    """Same logits in, same loss and gradient out: the head is the identity."""
    logits = make_case(rng, device, rows=5, vocab=97, id_weights=True)
    eye = torch.eye(97, device=device)
    leaves = {"hidden": logits.leaves["logits"], "linear_weight": eye}
    linear = logits.changed(leaves=leaves).run(backend)
    direct = logits.run(backend)
    exact = logits.in_dtype(torch.float64).run("eager")
    assert_terms_match(logits, linear, exact)
    grads = linear.grads["hidden"], exact.grads["logits"], direct.grads["logits"]
    compare("grad of hidden", *grads, parts_of(logits, "logits"))


def test_auto_is_triton_on_a_gpu_and_torch_elsewhere(device, monkeypatch) -> None:
    picked = []

    def spy(backend: str) -> Any:
        picked.append(backend)
        return original(backend)

    original = autograd.row_step_of
    for module in (autograd, chunks):
        monkeypatch.setattr(module, "row_step_of", spy)
    target = torch.tensor([1], device=device)
    safety_cross_entropy(torch.zeros(1, 4, device=device), target)
    hidden, weight = torch.zeros(1, 2, device=device), torch.zeros(4, 2, device=device)
    safety_linear_cross_entropy(hidden, weight, target)
    assert picked == ["triton" if device.type == "cuda" else "torch"] * 2


# Label smoothing and z-loss, against torch's own and one written by hand.


@pytest.mark.parametrize("backend", ["eager", "torch", "triton"])
@pytest.mark.parametrize("path", ["logits", "linear+lora"])
@pytest.mark.parametrize(("smoothing", "zeta"), [(0.1, 0.0), (0.0, 0.03), (0.3, 0.03), (0.99, 1.0)])
def test_smoothing_and_z_loss(backend, path, smoothing, zeta, rng, device) -> None:
    double = backend != "triton"
    options = {"ce_rows": "weights", "label_smoothing": smoothing, "z_loss_weight": zeta}
    options["dtype"] = torch.float64 if double else torch.float32
    options["vocab"] = 301 if double else 4103  # past one Triton block
    case = make_case(rng, device, path=path, **options)
    case = case.changed(ids=None, ref=None)
    got = case.run(backend)
    exact = case.in_dtype(torch.float64)
    leaves = exact.live_leaves()
    z = exact.changed(leaves=leaves).raw_logits()
    ce = torch.nn.functional.cross_entropy(
        z, case.target, reduction="none", label_smoothing=smoothing
    )
    kept = case.target != -100
    c = torch.where(kept, case.options["ce_row_weight"], 0).double() / kept.sum()
    z_loss = zeta * torch.log(z.exp().sum(1)).square()
    loss = (c * (ce + z_loss)).sum()
    loss.backward(torch.full_like(loss, case.upstream))
    close = {"rtol": 1e-11, "atol": 1e-13} if double else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(got.terms.loss.double(), loss.detach(), **close)
    # the z-loss is part of the loss, and not of the cross-entropy that is reported
    torch.testing.assert_close(got.terms.ce.double(), (c * ce).sum().detach(), **close)
    for name, leaf in leaves.items():
        torch.testing.assert_close(got.grads[name].double(), leaf.grad, **close)
    if not double:
        assert_matches_truth(case, got, backend)


@pytest.mark.parametrize("backend", ["eager", "torch", "triton"])
@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_smoothing_and_z_loss_of_one_word(backend: str, smoothing: float, device) -> None:
    """V = 1: lse = z, no cross-entropy whatever the smoothing, and the z-loss's gradient alone."""
    logits = torch.tensor([[3.0], [-2.0]], device=device, requires_grad=True)
    options = {"label_smoothing": smoothing, "z_loss_weight": 0.25, "backend": backend}
    target = torch.zeros(2, dtype=torch.int64, device=device)
    terms = safety_cross_entropy(logits, target, reduction="sum", **options)
    terms.loss.backward()
    assert float(terms.ce) == 0.0
    assert float(terms.loss.detach()) == pytest.approx(0.25 * (9 + 4))
    assert logits.grad.tolist() == [[pytest.approx(1.5)], [pytest.approx(-1.0)]]


@pytest.mark.parametrize("backend", ["eager", "torch", "triton"])
def test_smoothing_where_the_z_loss_takes_the_softmax_away(backend: str, device) -> None:
    """lse = -1 and zeta = 1/2: the factor 1 + 2 zeta lse of p is 0, of a row that takes part."""
    logits = torch.tensor([[-1.0, -200.0]], device=device, requires_grad=True)
    target = torch.zeros(1, dtype=torch.int64, device=device)
    options = {"label_smoothing": 0.5, "z_loss_weight": 0.5, "backend": backend}
    safety_cross_entropy(logits, target, reduction="sum", **options).loss.backward()
    assert logits.grad.tolist() == [[pytest.approx(-0.75), pytest.approx(-0.25)]]


@pytest.mark.parametrize("backend", ["eager", "torch", "triton"])
@pytest.mark.parametrize("zeta", [0.0, 1e-2])
def test_a_masked_vocabulary_without_smoothing(backend: str, zeta: float, device) -> None:
    """-inf has a mean of -inf, which nobody looks at while the smoothing is 0."""
    logits = torch.tensor([[1.0, -torch.inf, 2.0, -torch.inf]], device=device, requires_grad=True)
    target = torch.tensor([2], device=device)
    options = {"z_loss_weight": zeta, "metrics": True, "backend": backend}
    terms = safety_cross_entropy(logits, target, **options)
    terms.loss.backward()
    assert all(x.isfinite() for x in terms) and logits.grad.isfinite().all()
    assert not logits.grad[0, [1, 3]].any()
