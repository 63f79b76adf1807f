"""The two modules: the functions with tokens and options held."""

from __future__ import annotations

import pytest
import torch
from cases import make_case, present

from str_kernels import (
    SafetyCrossEntropyLoss,
    SafetyLinearCrossEntropyLoss,
    SafetyPenalty,
    SafetyTokens,
    safety_cross_entropy,
    safety_linear_cross_entropy,
)

MODULES = {"logits": SafetyCrossEntropyLoss, "linear": SafetyLinearCrossEntropyLoss}
FUNCTIONS = {"logits": safety_cross_entropy, "linear": safety_linear_cross_entropy}


@pytest.mark.parametrize("path", MODULES)
def test_a_module_is_its_function(path: str, rng) -> None:
    case = make_case(rng, torch.device("cpu"), path=path, transform="cap", counts="numbers")
    held = {name: case.options[name] for name in ("softcap", "num_items")}
    tokens = SafetyTokens(ids=case.ids)
    module = MODULES[path](tokens, case.options["penalty"], **held)
    leaves = case.live_leaves()
    terms = module(*leaves.values(), case.target, case.ref)
    terms.loss.backward()
    again = case.live_leaves()
    wanted = FUNCTIONS[path](
        *again.values(), case.target, case.ids, case.ref, penalty=case.options["penalty"], **held
    )
    wanted.loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(present(terms), present(wanted), strict=True))
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, again[name].grad)
    # an argument of the call goes before one that is held
    other = module(*case.leaves.values(), case.target, case.ref, num_items=1)
    assert float(other.ce) == pytest.approx(float(terms.ce) * held["num_items"], rel=1e-6)


@pytest.mark.parametrize("module", MODULES.values())
def test_what_a_module_carries(module) -> None:
    loss = module(SafetyTokens(ids=[4, 2]), softcap=30.0)
    assert loss.state_dict() == {} and list(loss.parameters()) == []
    assert loss.safety_ids.tolist() == [4, 2] and loss.to("meta").safety_ids.device.type == "meta"
    assert loss.penalty.weight == SafetyPenalty().weight
    assert "K=2" in repr(loss) and "kind='mse'" in repr(loss) and "softcap=30.0" in repr(loss)


@pytest.mark.parametrize("path", MODULES)
def test_the_tokens_weights_are_used(path: str, rng) -> None:
    """As `attach` does: the tokens' own weights, unless the penalty has some."""
    case = make_case(rng, torch.device("cpu"), path=path)
    a = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    given = (*case.leaves.values(), case.target)
    weighted = FUNCTIONS[path](*given, case.ids, case.ref, penalty=SafetyPenalty(id_weights=a))
    tokens = SafetyTokens(ids=case.ids, id_weights=a)
    assert torch.equal(MODULES[path](tokens)(*given, case.ref).penalty, weighted.penalty)
    ones = SafetyPenalty(id_weights=torch.ones(5))
    plain = MODULES[path](SafetyTokens(ids=case.ids))(*given, case.ref).penalty
    assert torch.equal(MODULES[path](tokens, ones)(*given, case.ref).penalty, plain)
    assert plain != weighted.penalty
