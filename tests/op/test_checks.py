"""Bad input: the right exception, and a message that begins with the argument and says why.

`<argument>` must <rule>; got <value>
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from str_kernels import (
    SafetyPenalty,
    SafetyTokens,
    safety_cross_entropy,
    safety_linear_cross_entropy,
)
from str_kernels.op import backends

MESSAGE = re.compile(r"^`(\w+)(\[\d\])?` must .+; got .+", re.S)
META = torch.zeros(0, device="meta").device


def good(function: Any) -> dict[str, Any]:
    """Return arguments that are right: 4 rows, 10 columns, 3 ids."""
    shared = {
        "target": torch.tensor([0, 1, -100, 9]),
        "safety_ids": torch.tensor([2, 5, 0]),
        "ref_safety_logits": torch.zeros(4, 3),
    }
    if function is safety_cross_entropy:
        return {"logits": torch.zeros(4, 10), **shared}
    return {"hidden": torch.zeros(4, 6), "linear_weight": torch.zeros(10, 6), **shared}


def named(error: pytest.ExceptionInfo) -> str:
    found = MESSAGE.match(str(error.value))
    assert found, f"not of the house's form: {error.value}"
    return found[1]


zeros, ones, tensor = torch.zeros, torch.ones, torch.tensor


def bad(argument: str, error: type[Exception], *values: Any, named: str = "") -> list[Any]:
    """Return rows of argument, bad value, exception, and the argument that the message names."""
    return [(argument, value, error, named or argument) for value in values]


WRONG_SHAPES = (ones(3), ones(4, 1), ones(()), ones(4).to(META))
WRONG_WEIGHTS = (ones(4).to(torch.int64), ones(4).to(torch.bool), 1.0)
BOTH = [
    *bad("target", TypeError, [0, 1, 2, 3], None, zeros(4).to(torch.int32), zeros(4)),
    *bad("target", ValueError, zeros(3).to(torch.int64), zeros(4, 1).to(torch.int64)),
    *bad("target", ValueError, zeros(4, dtype=torch.int64).to(META), tensor([0, 1, 10, 0])),
    *bad("target", ValueError, tensor([0, -1, 1, 0])),
    *bad("safety_ids", ValueError, None, tensor([2, 5]), named="ref_safety_logits"),
    *bad("safety_ids", TypeError, [2, 5, 0], tensor([2, 5, 0]).to(torch.int32)),
    *bad("safety_ids", TypeError, tensor([2.0, 5.0, 0.0])),
    *bad("safety_ids", ValueError, tensor([[2, 5, 0]]), tensor([2, 5, 0]).to(META)),
    *bad("safety_ids", ValueError, tensor([2, 5, 10]), tensor([2, 5, -1]), tensor([2, 5, 2])),
    *bad("ref_safety_logits", ValueError, None, zeros(4, 4), zeros(3, 3), zeros(4), zeros(1, 3)),
    *bad("ref_safety_logits", ValueError, zeros(4, 3).to(META), [[0.0] * 3] * 4),
    *bad("ref_safety_logits", TypeError, zeros(4, 3).to(torch.int64)),
    *bad("penalty", TypeError, 0.1, None),
    *bad("penalty", ValueError, SafetyPenalty(id_weights=ones(4)), named="id_weights"),
    *bad("num_items", ValueError, -1, float("nan"), float("inf"), ones(1), ones(()).to(META)),
    *bad("num_items", TypeError, "4", True),
    *bad("num_safety_items", ValueError, -0.5, ones(4)),
    *bad("ignore_index", TypeError, None, -100.0, True),
    *bad("reduction", ValueError, "max", None, ["mean"]),
    *bad("label_smoothing", ValueError, 1.0, 1.5, -0.1, float("nan")),
    *bad("label_smoothing", TypeError, None, True, tensor(0.1)),
    *bad("z_loss_weight", ValueError, -1e-4, float("inf"), float("nan")),
    *bad("z_loss_weight", TypeError, "1e-4", True),
    *bad("metrics", TypeError, None, 1, "accuracy"),
    *bad("logit_scale", TypeError, None, "1", ones(())),
    *bad("logit_scale", ValueError, 0.0, float("nan")),
    *bad("softcap", ValueError, 0.0, -30.0, float("inf")),
    *bad("softcap", TypeError, True),
    *bad("backend", ValueError, "cuda", None),
    *bad("safety_row_weight", ValueError, *WRONG_SHAPES),
    *bad("safety_row_weight", TypeError, *WRONG_WEIGHTS),
    *bad("ce_row_weight", ValueError, *WRONG_SHAPES),
    *bad("ce_row_weight", TypeError, *WRONG_WEIGHTS),
]
LOGITS = [
    *bad("logits", TypeError, None, zeros(4, 10).to(torch.int64), zeros(4, 10).to(torch.complex64)),
    *bad("logits", ValueError, zeros(2, 2, 10), zeros(10)),
    *bad("logits", ValueError, zeros(5, 10), zeros(4, 10).to(META), named="target"),
    *bad("inplace", TypeError, None, 1),
]
LINEAR = [
    *bad("hidden", TypeError, None, zeros(4, 6).to(torch.int64)),
    *bad("hidden", ValueError, zeros(2, 2, 6)),
    *bad("hidden", TypeError, zeros(4, 6).to(torch.bfloat16), named="linear_weight"),
    *bad("hidden", ValueError, zeros(4, 6).to(META), named="linear_weight"),
    *bad("linear_weight", TypeError, None, zeros(10, 6).to(torch.float64)),
    *bad("linear_weight", TypeError, zeros(10, 6).to(torch.int8)),
    *bad("linear_weight", ValueError, zeros(6, 10), zeros(10), zeros(10, 6).to(META)),
    *bad("linear_bias", TypeError, 0.0, zeros(10).to(torch.bfloat16), zeros(10).to(torch.int64)),
    *bad("linear_bias", ValueError, zeros(6), zeros(10).to(META)),
    *bad("low_rank", TypeError, zeros(4, 2), (zeros(4, 2),), (zeros(4, 2),) * 3, "lora"),
    *bad("low_rank", TypeError, (zeros(4, 2), None), (None, None)),
    *bad("low_rank", TypeError, (zeros(4, 2).bfloat16(), zeros(10, 2))),
    *bad("low_rank", TypeError, (zeros(4, 2), zeros(10, 2).double())),
    *bad("low_rank", TypeError, (zeros(4, 2).long(), zeros(10, 2).long())),
    *bad("low_rank", ValueError, (zeros(3, 2), zeros(10, 2)), (zeros(4, 2), zeros(9, 2))),
    *bad("low_rank", ValueError, (zeros(4, 2), zeros(2, 10)), (zeros(4, 2), zeros(10, 3))),
    *bad("low_rank", ValueError, (zeros(4), zeros(10)), (zeros(4, 2).to(META), zeros(10, 2))),
    *bad("low_rank", ValueError, (zeros(4, 2), zeros(10, 2).to(META))),
    *bad("pack_rows", TypeError, 1, "auto"),
    *bad("chunk_bytes", ValueError, 63, 0, -1),
    *bad("chunk_bytes", TypeError, True, 1e9, "1 GB"),
]
CALLS = [
    (function, *row)
    for function, rows in [
        (safety_cross_entropy, LOGITS + BOTH),
        (safety_linear_cross_entropy, LINEAR + BOTH),
    ]
    for row in rows
]


def label(value: Any) -> str | None:
    if isinstance(value, (tuple, list)) and any(isinstance(x, torch.Tensor) for x in value):
        return "+".join(str(label(x)) for x in value)
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(value.shape)}{value.device}".removeprefix("torch.")
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("function", "argument", "value", "error", "name"), CALLS, ids=label)
def test_a_bad_argument_is_named(function, argument, value, error, name) -> None:
    with pytest.raises(error) as caught:
        function(**{**good(function), argument: value})
    assert named(caught) == name
    assert type(caught.value) is error


@pytest.mark.parametrize("function", [safety_cross_entropy, safety_linear_cross_entropy])
def test_the_good_arguments_are_good(function) -> None:
    """Else the table above would show nothing."""
    terms = function(**good(function))
    assert terms.loss.isfinite()
    legal: list[dict[str, Any]] = [
        *({"num_items": 0}, {"num_items": tensor(3)}, {"num_safety_items": 0.0}, {"softcap": 30}),
        *({"logit_scale": 2}, {"label_smoothing": 0}, {"label_smoothing": 0.999}),
        *({"z_loss_weight": 1}, {"metrics": True}, {"ref_safety_logits": torch.zeros(3)}),
        {"ref_safety_logits": torch.zeros(4, 3, dtype=torch.float64)},
        {"safety_row_weight": torch.ones(4, dtype=torch.float16)},
        {"ignore_index": 0},
        {"target": torch.full((4,), -7), "ignore_index": -7},
    ]
    for options in legal:
        given = {**good(function), **options}
        if options == {"ignore_index": 0}:
            given["target"] = torch.tensor([0, 1, 2, 9])
        assert function(**given).loss.isfinite(), options
    assert function(**good(function), reduction="none").loss.isfinite().all()
    if function is safety_linear_cross_entropy:
        for options in (
            {"low_rank": (torch.zeros(4, 2), torch.zeros(10, 2))},
            {"low_rank": [torch.zeros(4, 0), torch.zeros(10, 0)]},
            {"pack_rows": None},
            {"pack_rows": True},
            {"pack_rows": False},
            {"chunk_bytes": 64},
        ):
            assert function(**good(function), **options).loss.isfinite(), options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": zeros(3).long()}, r"must have shape \(4,\); got \(3,\)"),
        (
            {"target": tensor([0, 1, 10, 11])},
            r"must be in \[0, 10\) or -100 .*; got 10 in row 2",
        ),
        ({"safety_ids": tensor([2, 5, 2])}, r"must be distinct; got \[2\] more than once"),
        (
            {"ref_safety_logits": zeros(4, 4)},
            r"must have shape \(4, 3\) or \(3,\); got shape \(4, 4\)",
        ),
        ({"backend": "cuda"}, r"must be one of auto, triton, .*, eager; got 'cuda'"),
        ({"label_smoothing": 1.0}, r"must be in \[0, 1\); got 1.0"),
        ({"z_loss_weight": -1.0}, r"must be finite and >= 0; got -1.0"),
        ({"reduction": "max"}, "must be 'mean', 'sum' or 'none'; got 'max'"),
        ({"chunk_bytes": 63}, r"must be at least 64.*; got 63"),
        (
            {"low_rank": (zeros(4, 2), zeros(10, 3))},
            r"low_rank.* must have shape \(10, 2\); got \(10, 3\)",
        ),
    ],
    ids=label,
)
def test_messages_say_what_was_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        safety_linear_cross_entropy(**{**good(safety_linear_cross_entropy), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"id_weights": zeros(2)}, "must not all be 0"),
        ({"kind": "l2"}, "mse, huber, hinge, centered, logprob, subset_kl, coarse_kl; got"),
    ],
    ids=label,
)
def test_messages_of_a_penalty_say_what_was_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SafetyPenalty(**options)


NUMBERS = (0.0, 0, -1.0, float("nan"), float("inf"))
PENALTIES = [
    *bad("weight", ValueError, -0.1, float("nan"), float("inf"), ones(1)),
    *bad("weight", TypeError, "0.1", True, None, ones(()).to(torch.int64)),
    *bad("kind", ValueError, "MSE", None, "kl", ["mse"]),
    *bad("temperature", ValueError, *NUMBERS),
    *bad("temperature", TypeError, None, "1", True, ones(())),
    *bad("delta", ValueError, *NUMBERS),
    *bad("delta", TypeError, None, "1", True, ones(())),
    *bad("id_weights", ValueError, zeros(3), ones(3, 1), tensor([1.0, -1.0])),
    *bad("id_weights", ValueError, tensor([1.0, float("nan")]), tensor([1.0, float("inf")])),
    *bad("id_weights", TypeError, [1.0], ones(3).to(torch.int64)),
]
TOKENS = [
    *bad("ids", TypeError, None, "abc", 1.5, [1, 2.0], [1, True], [[1, 2]]),
    *bad("ids", TypeError, tensor([1, 2], dtype=torch.int32)),
    *bad("ids", ValueError, tensor([[1, 2]]), [1, -1], [1, 2, 1], [1, 5]),
    *bad("id_weights", ValueError, [1.0], ones(2, 1), [1.0, -1.0], [1.0, float("nan")]),
    *bad("pieces", ValueError, ("a",)),
]


@pytest.mark.parametrize(
    ("cls", "option", "value", "error", "name"),
    [(SafetyPenalty, *row) for row in PENALTIES] + [(SafetyTokens, *row) for row in TOKENS],
    ids=label,
)
def test_a_bad_option_is_named_when_it_is_made(cls, option, value, error, name) -> None:
    good_options = {"ids": [1, 2], "vocab_size": 5} if cls is SafetyTokens else {}
    with pytest.raises(error) as caught:
        cls(**{**good_options, option: value})
    assert named(caught) == name


def test_a_tensor_weight_is_not_read() -> None:
    """Reading it would wait for the device; a meta tensor has nothing to read."""
    assert SafetyPenalty(weight=torch.ones((), device="meta")).weight.device.type == "meta"


def test_a_penalty_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        SafetyPenalty().weight = 0.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="the answers are those of a CPU")
def test_a_backend_that_cannot_run_here_says_why(monkeypatch) -> None:
    cpu = torch.device("cpu")
    assert backends.choose_backend("auto", cpu, torch.float32) == "torch"
    monkeypatch.setattr(backends, "_interpreting", lambda: False)
    with pytest.raises(ValueError) as caught:
        safety_cross_entropy(**good(safety_cross_entropy), backend="triton")
    assert named(caught) == "backend" and "TRITON_INTERPRET=1" in str(caught.value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the package triton is not installed"):
        safety_cross_entropy(**good(safety_cross_entropy), backend="triton")


def test_triton_refuses_float64() -> None:
    given = {**good(safety_cross_entropy), "logits": torch.zeros(4, 10, dtype=torch.float64)}
    with pytest.raises(ValueError, match="the input is float64") as caught:
        safety_cross_entropy(**given, backend="triton")
    assert named(caught) == "backend"
    assert safety_cross_entropy(**given).loss.dtype == torch.float64  # auto finds another
