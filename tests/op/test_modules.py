"""The options of the loss, each written once; and the modules that hold them."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, FrozenInstanceError, fields
from typing import Any, get_type_hints

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
from str_kernels.op import LossOptions, functional
from str_kernels.op.autograd import _ARGS
from str_kernels.op.contracts import RowNumbers, RowOptions

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


@pytest.mark.parametrize("module", MODULES.values())
def test_a_module_refuses_an_option_before_the_first_step(module) -> None:
    tokens = SafetyTokens(ids=[4, 2])
    with pytest.raises(TypeError, match=r"`sofcap` must be one of .*softcap.*; got sofcap=30.0"):
        module(tokens, sofcap=30.0)
    with pytest.raises(ValueError, match="`softcap` must be finite and > 0; got -1"):
        module(tokens, softcap=-1)


LEAVES = {
    safety_cross_entropy: {"logits": torch.zeros(2, 5)},
    safety_linear_cross_entropy: {
        "hidden": torch.zeros(2, 3),
        "linear_weight": torch.zeros(5, 3),
    },
}
# What one path alone knows: the comment in LossOptions says why these are no fields.
OF_ONE_PATH = {
    "inplace",
    *("linear_bias", "low_rank", "pack_rows", "chunk_bytes", "process_group"),
}
OTHER_VALUES: dict[str, Any] = {
    "penalty": SafetyPenalty(0.3),
    "safety_row_weight": torch.ones(2),
    "ce_row_weight": torch.ones(2),
    "num_items": 3,
    "num_safety_items": 4,
    "ignore_index": -1,
    "reduction": "sum",
    "label_smoothing": 0.5,
    "z_loss_weight": 0.25,
    "logit_scale": 2.0,
    "softcap": 30.0,
    "metrics": True,
    "backend": "torch",
}


@pytest.mark.parametrize("function", LEAVES)
def test_the_functions_keywords_are_the_fields(function: Any) -> None:
    keywords = {
        name: one.default
        for name, one in inspect.signature(function).parameters.items()
        if one.kind is inspect.Parameter.KEYWORD_ONLY and name not in OF_ONE_PATH
    }
    assert keywords == {one.name: one.default for one in fields(LossOptions)}
    assert MISSING not in keywords.values()


@pytest.mark.parametrize("function", LEAVES)
def test_every_option_arrives(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[LossOptions] = []

    def spy(*args: Any) -> Any:
        seen.append(next(one for one in args if isinstance(one, LossOptions)))
        return make(*args)

    make = functional.make_loss_args
    monkeypatch.setattr(functional, "make_loss_args", spy)
    assert set(OTHER_VALUES) == {one.name for one in fields(LossOptions)}, "a value for the new one"
    function(**LEAVES[function], target=torch.tensor([1, 2]), **OTHER_VALUES)
    for name, value in OTHER_VALUES.items():
        assert getattr(seen[0], name) is value, name


def test_the_ops_take_every_number() -> None:
    taken = [words.split() for words in _ARGS.split(", ")]
    wanted = get_type_hints(RowOptions)
    assert {name: kind for kind, name in taken if name in wanted} == {
        name: kind.__name__ for name, kind in wanted.items()
    }
    assert {one.name for one in fields(RowNumbers)} < set(wanted)


def test_the_options_check_themselves_and_stay_as_they_are() -> None:
    options = LossOptions(softcap=30)
    with pytest.raises(FrozenInstanceError):
        options.softcap = 2.0  # type: ignore[misc] # which is the point
    with pytest.raises(ValueError, match=r"`label_smoothing` must be in \[0, 1\); got 1.0"):
        LossOptions(label_smoothing=1.0)
