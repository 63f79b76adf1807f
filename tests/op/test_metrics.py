"""Accuracy and entropy: what `metrics=True` adds to a pass over the logits."""

from __future__ import annotations

import math

import pytest
import torch
from cases import PATHS, Result, assert_same, make_case, with_masked_vocabulary
from tolerance import assert_matches_truth

from str_kernels import safety_cross_entropy, safety_linear_cross_entropy

pytestmark = pytest.mark.gpu

BACKENDS = ["eager", "torch", "triton"]
BLOCK = 4096  # of the Triton kernel: a tie may lie across two of them


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_metrics_there_are_none(backend, path, reduction, rng, device) -> None:
    """And with them nothing else changes, bit for bit."""
    case = make_case(rng, device, path=path, reduction=reduction)
    without, with_them = case.run(backend), case.with_options(metrics=True).run(backend)
    assert without.terms[4:] == (None, None)
    assert all(x is not None for x in with_them.terms)
    terms = with_them.terms._replace(token_accuracy=None, entropy=None)
    assert_same(Result(terms, with_them.grads), without)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "places", [(3, 7), (5, BLOCK + 3), (BLOCK - 1, BLOCK), (0, 2 * BLOCK + 8), (1, 2, BLOCK + 1)]
)
def test_the_first_of_equal_maxima_is_the_answer(backend, places, device) -> None:
    vocab = 2 * BLOCK + 9
    logits = torch.zeros(len(places), vocab, device=device)
    logits[:, list(places)] = 2.5
    target = torch.tensor(places, device=device)
    terms = safety_cross_entropy(logits, target, metrics=True, reduction="none", backend=backend)
    assert terms.token_accuracy.tolist() == [1.0] + [0.0] * (len(places) - 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab", [1, 2, 17, BLOCK + 5])
def test_all_logits_equal(backend: str, vocab: int, device) -> None:
    """The answer is token 0, the entropy is that of a fair die."""
    logits = torch.full((2, vocab), -3.0, device=device)
    target = torch.tensor([0, vocab - 1], device=device)
    terms = safety_cross_entropy(logits, target, metrics=True, reduction="none", backend=backend)
    assert terms.token_accuracy.tolist() == [1.0, 1.0 if vocab == 1 else 0.0]
    wanted = torch.full((2,), math.log(vocab), device=device)
    torch.testing.assert_close(terms.entropy, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_cap_makes_ties(backend: str, device) -> None:
    """The answer is the largest of the capped logits, which the loss is made of: both are 5."""
    logits = torch.tensor([[0.0, 1e4, 3e4, 1.0]], device=device)
    for target, right in ((1, 1.0), (2, 0.0)):
        given = {"softcap": 5.0, "metrics": True, "backend": backend}
        terms = safety_cross_entropy(logits, torch.tensor([target], device=device), **given)
        assert float(terms.token_accuracy) == right


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transform", ["none", "scale+cap"])
def test_entropy_is_the_formula(backend: str, transform: str, rng, device) -> None:
    """With a masked vocabulary, of which a whole first block in some rows, and sure rows."""
    cap = transform != "none"
    case = make_case(rng, device, rows=6, vocab=BLOCK + 201, transform=transform, metrics=True)
    case.leaves["logits"][5] *= 30.0 if cap else 300.0  # one token has it all
    if not cap:  # a cap of -inf is -t
        case, _ = with_masked_vocabulary(case, rng, 0.3)
    logits = case.leaves["logits"]
    result = case.run(backend)
    assert_matches_truth(case, result, backend)
    u = logits.double() * case.options["logit_scale"]
    z = 5.0 * torch.tanh(u / 5.0) if cap else u
    rows = -(z.softmax(1) * z.log_softmax(1).clamp(min=-1e6)).sum(1)
    kept = case.target != -100
    assert float(result.terms.entropy) == pytest.approx(float(rows[kept].mean()), rel=1e-5)
    right = (z.float().argmax(1) == case.target)[kept].double().mean()
    assert float(result.terms.token_accuracy) == pytest.approx(float(right), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sure_row_has_no_entropy(backend: str, device) -> None:
    """p is exactly 1 and 0: 0 log 0 is 0, and the rest must not be negative by a rounding."""
    logits = torch.full((1, 50), -200.0, device=device)
    logits[0, 20] = 100.0
    target = torch.tensor([20], device=device)
    terms = safety_cross_entropy(logits, target, metrics=True, backend=backend)
    assert float(terms.entropy) == 0.0 and float(terms.token_accuracy) == 1.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", PATHS)
def test_ignored_rows_count_for_nothing(backend: str, path: str, rng, device) -> None:
    """Not even where they carry a penalty; the divisor is num_items."""
    case = make_case(rng, device, path=path, rows=8, safety_rows="weights", metrics=True)
    case = case.changed(target=case.target.clone())
    case.target[3:5] = -100
    rows = case.with_options(reduction="none").changed(row_upstream=torch.ones(8, device=device))
    each = rows.run(backend).terms
    ignored = case.target == -100
    for values, name in ((each.token_accuracy, "token_accuracy"), (each.entropy, "entropy")):
        assert not values[ignored].any()
        mean = getattr(case.run(backend).terms, name)
        kept = (~ignored).sum()
        torch.testing.assert_close(mean, values.sum() / kept, rtol=1e-6, atol=0)
        of_16 = getattr(case.with_options(num_items=16).run(backend).terms, name)
        torch.testing.assert_close(of_16, values.sum() / 16, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_of_an_ignored_row_is_not_counted(backend: str, rng, device) -> None:
    case = make_case(rng, device, metrics=True)
    case.target[3] = -100
    clean = case.run(backend).terms
    logits = case.leaves["logits"].clone()
    logits[3] = torch.nan
    spoilt = case.with_leaves(logits=logits).run(backend).terms
    assert torch.equal(spoilt.token_accuracy, clean.token_accuracy)
    assert torch.equal(spoilt.entropy, clean.entropy)


@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics_of_a_model_that_is_only_looked_at(backend: str, device) -> None:
    """Under no_grad and without ids, as in an evaluation."""
    eye = 9.0 * torch.eye(5, device=device)
    target = torch.tensor([0, 1, 2, 3, 0], device=device)
    with torch.no_grad():
        terms = safety_linear_cross_entropy(eye, eye, target, metrics=True, backend=backend)
    assert float(terms.token_accuracy) == pytest.approx(0.8)
    assert not terms.loss.requires_grad
