"""Kind "coarse_kl": the KL divergence of the safety tokens and all others as one outcome."""

from __future__ import annotations

import pytest
import torch
from test_penalty_kinds import BACKENDS, anchored, gradient

from str_kernels import SafetyPenalty, safety_cross_entropy

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_kl_of_fewer_outcomes(backend: str, rng, device) -> None:
    """With all tokens but one it is the whole KL; with fewer it is never more than that."""
    rows, vocab = 6, 19
    logits, moved = (torch.randn(rows, vocab, generator=rng).to(device) for _ in range(2))
    ref = (logits + moved).double().log_softmax(1)
    whole = float((ref.exp() * (ref - logits.double().log_softmax(1))).sum())
    order = torch.randperm(vocab, generator=rng).to(device)
    ignored = torch.full((rows,), -100, device=device)
    found = []
    for ids in (order[:18], order[:7], order[:1]):
        terms = safety_cross_entropy(
            logits, ignored, ids, ref[:, ids].float(), penalty=SafetyPenalty(1.0, "coarse_kl"),
            safety_row_weight=torch.ones(rows, device=device), reduction="sum", backend=backend,
        )  # fmt: skip
        found.append(float(terms.penalty))
    assert found[0] == pytest.approx(whole, rel=1e-4)
    assert found[0] > found[1] > found[2] > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_pulls_by_probabilities_and_no_more(backend: str, rng, device) -> None:
    """On each logit by p - q of its token, or of the rest: in all no more than 2 a row."""
    case = anchored(rng, device, "coarse_kl", ids=5)
    ref = torch.full_like(case.ref, -30.0)
    ref[:, 0] = -1e-3  # nearly sure of one token, which random logits are not
    grad = gradient(case.changed(ref=ref), backend)
    assert bool((grad.abs().sum(1) <= 2 + 1e-4).all()) and bool((grad[:, case.ids[0]] < 0).all())
    p = case.leaves["logits"].double().softmax(1)[:, case.ids[0]]
    torch.testing.assert_close(
        grad[:, case.ids[0]], p - ref[:, 0].double().exp(), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_of_an_id_that_the_reference_rules_out(backend: str, rng, device) -> None:
    case = anchored(rng, device, "coarse_kl", ids=4)
    ref = case.ref.clone()
    ref[:, 2] = -torch.inf
    result = case.changed(ref=ref).run(backend)
    assert torch.isfinite(result.terms.penalty) and float(result.terms.max_drift) == torch.inf
    assert torch.isfinite(result.grads["logits"]).all()
    assert bool((result.grads["logits"][:, case.ids[2]] > 0).all())  # down, by p
