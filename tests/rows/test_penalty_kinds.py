"""Each kind of penalty by itself: what sets it apart, its edges, and the reference of "logprob"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    DELTA,
    EXTRAS,
    KINDS,
    ON_LOG_PROBS,
    PATHS,
    ROW_WEIGHTS,
    TEMPERATURE,
    Case,
    assert_same,
    cap,
    make_case,
    with_masked_vocabulary,
)
from test_penalties import skip_without
from tolerance import assert_matches_truth

from str_kernels import SafetyPenalty, project, safety_cross_entropy, safety_log_probs

pytestmark = pytest.mark.gpu
OURS = ["torch", "triton"]
BACKENDS = ["eager", *OURS]


def anchored(rng, device, kind: str, **options: Any) -> Case:
    """Rows without a target, whose gradient is the penalty's alone."""
    case = make_case(rng, device, kind=kind, reduction="sum", **options)
    return case.changed(
        target=torch.full_like(case.target, -100),
        upstream=1.0 / float(case.options["penalty"].weight),
    ).with_options(safety_row_weight=torch.ones(len(case.target), device=device))


def gradient(case: Case, backend: str) -> torch.Tensor:
    grad = case.run(backend).grads["logits"]
    assert grad is not None
    return grad.double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_anchor_row(kind: str, backend: str, rng, device) -> None:
    """A prompt without an answer: no cross-entropy, but held, on log-probabilities by all V."""
    case = anchored(rng, device, kind, vocab=301, ids=5)
    result = case.run(backend)
    assert float(result.terms.ce) == 0.0 and float(result.terms.penalty) > 0
    assert_matches_truth(case, result, backend)
    on_set = torch.zeros(301, dtype=torch.bool, device=device)
    on_set[case.ids] = True
    others = result.grads["logits"][:, ~on_set]
    assert bool(others.all()) if kind in ON_LOG_PROBS else not others.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_huber_at_its_corner(backend: str, device) -> None:
    """|d| is exactly delta, a step below it and a step above: the value and slope are one."""
    delta = 0.5
    step = 2.0**-20
    d = torch.tensor([delta, -delta, delta - step, delta + step, -4.0], device=device)
    logits = torch.zeros(1, 9, device=device)
    logits[0, :5] = 1.0
    logits.requires_grad_()
    ids = torch.arange(5, device=device)
    ignored, one = torch.full((1,), -100, device=device), torch.ones(1, device=device)
    options = {"penalty": SafetyPenalty(1.0, "huber", delta=delta), "backend": backend}
    terms = safety_cross_entropy(logits, ignored, ids, 1.0 - d, safety_row_weight=one, **options)
    terms.loss.backward()
    wanted = torch.nn.functional.huber_loss(d.double(), torch.zeros_like(d).double(), delta=delta)
    assert float(terms.penalty) == pytest.approx(float(wanted), rel=1e-6)
    slope = d.double().clamp(-delta, delta) / 5
    torch.testing.assert_close(logits.grad[0, :5].double(), slope, rtol=1e-6, atol=0)
    assert float(terms.max_drift) == 4.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_huber_of_a_far_token_is_finite(backend: str, device) -> None:
    """1e30 squared is inf in float32; its Huber loss is not."""
    logits = torch.tensor([[0.0, 1.0, 1e30]], device=device).neg().requires_grad_()
    ids = torch.tensor([2], device=device)
    target, ref = torch.zeros_like(ids), torch.zeros(1, device=device)
    penalty = SafetyPenalty(1.0, "huber", delta=2.0)
    terms = safety_cross_entropy(logits, target, ids, ref, penalty=penalty, backend=backend)
    terms.loss.backward()
    assert float(terms.penalty) == pytest.approx(2e30, rel=1e-6)
    assert float(logits.grad[0, 2]) == pytest.approx(-2.0, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hinge_pulls_only_where_a_logit_fell(backend: str, rng, device) -> None:
    case = anchored(rng, device, "hinge", ids=20)
    ref = case.ref.clone()
    ref[:, 0] = case.leaves["logits"][:, case.ids[0]]  # exactly at the corner
    case = case.changed(ref=ref)
    grad = gradient(case, backend)[:, case.ids]
    fell = case.leaves["logits"][:, case.ids] < ref
    assert bool((grad[fell] < 0).all()) and not grad[~fell].any()
    assert fell.any() and (~fell).any()
    above = case.changed(ref=case.leaves["logits"][:, case.ids] - 1.0).run(backend)
    assert float(above.terms.penalty) == 0.0 and not above.grads["logits"].any()
    assert float(above.terms.max_drift) == pytest.approx(1.0, rel=1e-5)  # told all the same


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", ["logits", "linear"])
def test_centered_sees_no_common_shift(backend: str, path: str, rng, device) -> None:
    case = make_case(rng, device, path=path, kind="centered", id_weights=True, ids=5)
    shifted = case.changed(ref=case.ref - 8.0)
    got, wanted = shifted.run(backend).terms, case.run("eager").terms
    # d is 8 larger, and with it one rounding of it
    torch.testing.assert_close(got.penalty, wanted.penalty, rtol=1e-5, atol=1e-6)
    assert float(got.max_drift) > 6.0
    case = anchored(rng, device, "centered", id_weights=True, ids=5)
    pull = gradient(case, backend)[:, case.ids]
    assert bool((pull.sum(1).abs() < 2e-5 * pull.abs().sum(1)).all())
    assert pull.abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_logprob_is_blind_to_what_softmax_is_blind_to(backend: str, rng, device) -> None:
    case = anchored(rng, device, "logprob", id_weights=True, ids=5)
    logits = case.leaves["logits"].to(torch.bfloat16).float()  # then a shift of 64 is exact
    here = case.with_leaves(logits=logits).run(backend)
    there = case.with_leaves(logits=logits + 64.0).run(backend)
    torch.testing.assert_close(here.terms.penalty, there.terms.penalty, rtol=3e-4, atol=0)
    grad = here.grads["logits"].double()
    # the pulls are made of d, a small difference of numbers as large as lse
    assert bool((grad.sum(1).abs() < 5e-5 * grad.abs().sum(1)).all())
    assert bool((grad != 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_subset_kl_is_0_at_the_reference(backend: str, dtype, rng, device) -> None:
    case = anchored(rng, device, "subset_kl", dtype=dtype, ids=20)
    case = case.changed(ref=case.leaves["logits"][:, case.ids])
    result = case.run(backend)
    assert float(result.terms.penalty) == 0.0
    # eager's is q - s sum(q), and a rounded sum is not 1
    assert bool((result.grads["logits"].abs() <= (1e-6 if backend == "eager" else 0)).all())
    # and a common shift is none
    shifted = case.changed(ref=case.ref.double() + 8.0).run(backend)
    assert abs(float(shifted.terms.penalty)) < 1e-5
    assert bool((shifted.grads["logits"].abs() < 1e-5).all())
    # with weights the minimum lies elsewhere, docs/loss.md
    a = 0.5 + torch.rand(20, generator=rng).to(device)
    weighted = case.with_options(penalty=SafetyPenalty(kind="subset_kl", id_weights=a))
    assert weighted.run(backend).grads["logits"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_subset_kl_in_other_units(backend: str, rng, device) -> None:
    """T^2 KL of logits that are T times as large, at temperature T, is T^2 times the one at 1."""
    case = anchored(rng, device, "subset_kl", ids=5)
    at_1 = case.with_options(penalty=SafetyPenalty(0.3, kind="subset_kl"))
    big = case.changed(ref=case.ref * 4).with_leaves(logits=case.leaves["logits"] * 4)
    at_4 = big.with_options(penalty=SafetyPenalty(0.3, kind="subset_kl", temperature=4.0))
    one, four = (given.in_dtype(torch.float64).run("eager") for given in (at_1, at_4))
    torch.testing.assert_close(four.terms.penalty, 16 * one.terms.penalty)
    torch.testing.assert_close(four.grads["logits"], 4 * one.grads["logits"])
    for given in (at_1, at_4):
        assert_matches_truth(given, given.run(backend), backend)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("size", [80.0, 1e4])
def test_subset_kl_of_logits_whose_exponential_overflows(backend, size, rng, device) -> None:
    """Shares of 1 and 0 on both sides: exp(80 T) is inf, and 0 log 0 is 0."""
    case = make_case(rng, device, kind="subset_kl", ids=5)
    logits = case.leaves["logits"].clone()
    logits[:, case.ids[0]] = size
    ref = case.ref.clone()
    ref[:, 1] = size
    case = case.with_leaves(logits=logits).changed(ref=ref)
    assert_matches_truth(case, case.run(backend), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["logits", "linear"])
def test_one_id(kind: str, backend: str, path: str, rng, device) -> None:
    """Alone, an id has no drift from the mean, and all of the share."""
    case = make_case(rng, device, kind=kind, ids=1, path=path)
    result = case.run(backend)
    assert_matches_truth(case, result, backend)
    penalty, drift = float(result.terms.penalty), float(result.terms.max_drift)
    if kind in ("centered", "subset_kl"):
        # d - a d / a: a GPU's division may be off by 2^-22, and leaves as much of d
        assert drift > abs(penalty) <= (kind == "centered") * (2.0**-21 * drift) ** 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["logits", "linear"])
def test_no_ids(kind: str, backend: str, path: str, rng, device) -> None:
    case = make_case(rng, device, kind=kind, ids=0, path=path, safety_rows="weights", **EXTRAS)
    result = case.run(backend)
    assert (float(result.terms.penalty), float(result.terms.max_drift)) == (0.0, 0.0)
    plain = case.changed(ids=None, ref=None).run(backend)
    assert torch.equal(result.terms.loss, plain.terms.loss)
    for name, grad in plain.grads.items():
        assert torch.equal(result.grads[name], grad)
    alone = anchored(rng, device, kind, ids=0).run(backend)
    assert not alone.grads["logits"].any() and float(alone.terms.loss) == 0.0


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_ids(kind: str, backend: str, dtype, rng, device) -> None:
    """500 of them, two Triton blocks of 256, the second ragged: a mean or a softmax spans both."""
    skip_without(backend, device)
    sizes = {"rows": 4, "vocab": 4500, "ids": 500, "transform": "cap"}
    case = make_case(rng, device, kind=kind, dtype=dtype, id_weights=True, **sizes, **EXTRAS)
    # The second block has the larger logits and references, where a running maximum moves.
    case.leaves["logits"][:, case.ids[256:]] += 2.0
    case.ref[:, 256:] += 1.5
    assert_matches_truth(case, case.run(backend), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_masked_logits_beside_the_safety_ids(kind: str, backend: str, rng, device) -> None:
    """-inf outside S is legal for every kind: p is 0 there, and so is the gradient."""
    case = make_case(rng, device, kind=kind, vocab=4300, rows=4, z_loss_weight=0.02, metrics=True)
    case, masked = with_masked_vocabulary(case, rng, 0.5)
    result = case.run(backend)
    assert not result.grads["logits"][masked].any()
    assert_matches_truth(case, result, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_subset_kl_of_a_masked_safety_id(backend: str, rng, device) -> None:
    """Masked in both models, its shares are 0 in both: it is as if it were not in the set."""
    case = anchored(rng, device, "subset_kl", ids=4)
    logits, ref = case.leaves["logits"].clone(), case.ref.clone()
    logits[:, case.ids[3]] = -torch.inf
    ref[:, 3] = -torch.inf
    masked = case.with_leaves(logits=logits).changed(ref=ref).run(backend)
    without = case.with_leaves(logits=logits).changed(ids=case.ids[:3], ref=ref[:, :3])
    wanted = without.run(backend)
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(masked.terms.penalty, wanted.terms.penalty, **close)
    torch.testing.assert_close(masked.grads["logits"], wanted.grads["logits"], **close)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_id_of_weight_0_is_not_held(kind: str, backend: str, rng, device) -> None:
    """It is not pulled to its reference; its share still counts among the subset's, or the rest."""
    case = anchored(rng, device, kind, ids=4)
    a = torch.tensor([1.0, 0.0, 0.5, 0.0], device=device)
    given = {**vars(case.options["penalty"]), "id_weights": a}
    case = case.with_options(penalty=SafetyPenalty(**given))
    result = case.run(backend)
    assert_matches_truth(case, result, backend)
    ref = case.ref.clone()
    ref[:, [1, 3]] += 3.0
    moved = case.changed(ref=ref).run(backend)
    torch.testing.assert_close(moved.terms.penalty, result.terms.penalty, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(moved.grads["logits"], result.grads["logits"], rtol=1e-4, atol=1e-6)
    if kind not in (*ON_LOG_PROBS, "subset_kl"):
        assert not result.grads["logits"][:, case.ids[[1, 3]]].any()


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["logits", "linear+lora"])
def test_every_target_is_a_safety_id(kind: str, backend: str, path: str, rng, device) -> None:
    case = make_case(rng, device, kind=kind, path=path, ids=7, id_weights=True, **EXTRAS)
    case = case.changed(target=case.ids.clone())
    assert_matches_truth(case, case.run(backend), backend)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_column_is_a_safety_id(kind: str, backend: str, rng, device) -> None:
    case = make_case(rng, device, kind=kind, vocab=19, ids=19, transform="cap", **EXTRAS)
    assert_matches_truth(case, case.run(backend), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_do_not_take_part_leak_nothing(kind, backend, rng, device) -> None:
    case = make_case(rng, device, kind=kind, **ROW_WEIGHTS, **EXTRAS)
    for name in ("safety_row_weight", "ce_row_weight"):
        case.options[name][3:6] = 0.0
    clean = case.run(backend)
    logits, ref = case.leaves["logits"].clone(), case.ref.clone()
    for row, poison in ((3, torch.nan), (4, torch.inf), (5, -torch.inf)):
        logits[row] = ref[row] = poison
    spoilt = case.with_leaves(logits=logits).changed(ref=ref).run(backend)
    assert_same(spoilt, clean)
    assert not spoilt.grads["logits"][3:6].any()


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_loss_of_a_row_is_masked_by_its_own_weight(kind, backend, rng, device) -> None:
    """A reference that is NaN where the penalty is off, a row with a penalty alone, and none."""
    case = make_case(rng, device, kind=kind, **ROW_WEIGHTS, **EXTRAS)
    case.options["safety_row_weight"][3:5] = 0.0
    case.options["ce_row_weight"][3:6] = torch.tensor([0.7, 0.0, 0.0])
    case.options["safety_row_weight"][5] = 0.4
    clean = case.run(backend)
    assert_matches_truth(case, clean, backend)
    ref = case.ref.clone()
    ref[3:5] = torch.nan
    assert_same(case.changed(ref=ref).run(backend), clean)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("kind", KINDS)
def test_inplace(kind: str, backend: str, rng, device) -> None:
    case = make_case(rng, device, kind=kind, transform="cap", **EXTRAS)
    wanted = case.run(backend)
    inplace = case.with_options(inplace=True)
    leaf = case.leaves["logits"].clone().requires_grad_()
    loss = inplace.loss({"logits": leaf * 1.0}, backend).loss
    loss.backward(case.cotangent(loss))
    assert torch.equal(leaf.grad, wanted.grads["logits"])


def test_the_defaults_of_the_options_are_those_the_formulas_name() -> None:
    penalty = SafetyPenalty()
    assert (penalty.kind, penalty.temperature, penalty.delta) == ("mse", 1.0, 1.0)
    assert TEMPERATURE != 1.0 and DELTA != 1.0, "else mixing them up would go unseen"


# safety_log_probs: what the reference of "logprob" is made of.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", PATHS[1:])
@pytest.mark.parametrize("transform", ["none", "scale+cap"])
def test_safety_log_probs(backend: str, path: str, transform: str, rng, device) -> None:
    case = make_case(rng, device, path=path, transform=transform, vocab=301, rows=9)
    options = {name: case.options[name] for name in ("logit_scale", "softcap")}
    leaves = case.live_leaves()
    head = {"linear_bias": leaves.get("linear_bias"), **case.low_rank_of(leaves)}
    given = (leaves["hidden"], leaves["linear_weight"], case.ids)

    def run(**more: Any) -> torch.Tensor:
        return safety_log_probs(*given, backend=backend, **head, **options, **more)

    got = run()
    z = cap(case.in_dtype(torch.float64).raw_logits(), options)
    wanted = z.log_softmax(1)[:, case.ids]
    torch.testing.assert_close(got.double(), wanted, rtol=2e-6, atol=2e-6)
    assert got.dtype == torch.float32 and not got.requires_grad
    for rows in (1, 4):
        torch.testing.assert_close(run(chunk_bytes=304 * 4 * rows), got, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("kind", ON_LOG_PROBS)
def test_log_probs_are_exactly_0_apart_at_step_0(kind, backend, dtype, rows, rng, device) -> None:
    """The same hidden states in the same chunks: the same normaliser, bit for bit."""
    case = make_case(rng, device, path="linear+lora", kind=kind, dtype=dtype, rows=rows)
    hidden, weight, *low_rank = case.leaves.values()
    ref = safety_log_probs(hidden, weight, case.ids, low_rank=tuple(low_rank), backend=backend)
    case = case.changed(ref=ref, target=case.target.clamp(min=0))
    terms = case.run(backend).terms
    assert float(terms.penalty) == 0.0 and float(terms.max_drift) == 0.0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ON_LOG_PROBS])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_other_kind_is_exactly_0_at_step_0(kind, backend, rng, device) -> None:
    case = make_case(rng, device, path="linear+lora", kind=kind, dtype=torch.bfloat16)
    hidden, weight, *low_rank = case.leaves.values()
    ref = project(hidden, weight, case.ids, low_rank=tuple(low_rank))
    terms = case.changed(ref=ref).run(backend).terms
    assert float(terms.penalty) == 0.0 and float(terms.max_drift) == 0.0
    assert torch.equal(terms.loss, terms.ce)
