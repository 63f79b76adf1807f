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


# argument that is changed, its bad value, the exception, the argument the message begins with
BOTH: list[tuple[str, Any, type[Exception], str]] = [
    ("target", [0, 1, 2, 3], TypeError, "target"),
    ("target", None, TypeError, "target"),
    ("target", torch.zeros(3, dtype=torch.int64), ValueError, "target"),
    ("target", torch.zeros(4, 1, dtype=torch.int64), ValueError, "target"),
    ("target", torch.zeros(4, dtype=torch.int32), TypeError, "target"),
    ("target", torch.zeros(4), TypeError, "target"),
    ("target", torch.zeros(4, dtype=torch.int64, device=META), ValueError, "target"),
    ("target", torch.tensor([0, 1, 10, 0]), ValueError, "target"),
    ("target", torch.tensor([0, -1, 1, 0]), ValueError, "target"),
    ("safety_ids", None, ValueError, "ref_safety_logits"),
    ("safety_ids", [2, 5, 0], TypeError, "safety_ids"),
    ("safety_ids", torch.tensor([[2, 5, 0]]), ValueError, "safety_ids"),
    ("safety_ids", torch.tensor([2, 5, 0], dtype=torch.int32), TypeError, "safety_ids"),
    ("safety_ids", torch.tensor([2.0, 5.0, 0.0]), TypeError, "safety_ids"),
    ("safety_ids", torch.tensor([2, 5, 0], device=META), ValueError, "safety_ids"),
    ("safety_ids", torch.tensor([2, 5, 10]), ValueError, "safety_ids"),
    ("safety_ids", torch.tensor([2, 5, -1]), ValueError, "safety_ids"),
    ("safety_ids", torch.tensor([2, 5, 2]), ValueError, "safety_ids"),
    ("safety_ids", torch.tensor([2, 5]), ValueError, "ref_safety_logits"),
    ("ref_safety_logits", None, ValueError, "ref_safety_logits"),
    ("ref_safety_logits", torch.zeros(4, 4), ValueError, "ref_safety_logits"),
    ("ref_safety_logits", torch.zeros(3, 3), ValueError, "ref_safety_logits"),
    ("ref_safety_logits", torch.zeros(4), ValueError, "ref_safety_logits"),
    ("ref_safety_logits", torch.zeros(1, 3), ValueError, "ref_safety_logits"),
    ("ref_safety_logits", torch.zeros(4, 3, dtype=torch.int64), TypeError, "ref_safety_logits"),
    ("ref_safety_logits", torch.zeros(4, 3, device=META), ValueError, "ref_safety_logits"),
    ("ref_safety_logits", [[0.0] * 3] * 4, ValueError, "ref_safety_logits"),
    ("penalty", 0.1, TypeError, "penalty"),
    ("penalty", None, TypeError, "penalty"),
    ("penalty", SafetyPenalty(id_weights=torch.ones(4)), ValueError, "id_weights"),
    ("num_items", -1, ValueError, "num_items"),
    ("num_items", float("nan"), ValueError, "num_items"),
    ("num_items", float("inf"), ValueError, "num_items"),
    ("num_items", "4", TypeError, "num_items"),
    ("num_items", True, TypeError, "num_items"),
    ("num_items", torch.ones(1), ValueError, "num_items"),
    ("num_items", torch.ones((), device=META), ValueError, "num_items"),
    ("num_safety_items", -0.5, ValueError, "num_safety_items"),
    ("num_safety_items", torch.ones(4), ValueError, "num_safety_items"),
    ("ignore_index", None, TypeError, "ignore_index"),
    ("ignore_index", -100.0, TypeError, "ignore_index"),
    ("ignore_index", True, TypeError, "ignore_index"),
    ("reduction", "max", ValueError, "reduction"),
    ("reduction", None, ValueError, "reduction"),
    ("reduction", ["mean"], ValueError, "reduction"),
    ("label_smoothing", 1.0, ValueError, "label_smoothing"),
    ("label_smoothing", 1.5, ValueError, "label_smoothing"),
    ("label_smoothing", -0.1, ValueError, "label_smoothing"),
    ("label_smoothing", float("nan"), ValueError, "label_smoothing"),
    ("label_smoothing", None, TypeError, "label_smoothing"),
    ("label_smoothing", True, TypeError, "label_smoothing"),
    ("label_smoothing", torch.tensor(0.1), TypeError, "label_smoothing"),
    ("z_loss_weight", -1e-4, ValueError, "z_loss_weight"),
    ("z_loss_weight", float("inf"), ValueError, "z_loss_weight"),
    ("z_loss_weight", float("nan"), ValueError, "z_loss_weight"),
    ("z_loss_weight", "1e-4", TypeError, "z_loss_weight"),
    ("z_loss_weight", True, TypeError, "z_loss_weight"),
    ("metrics", None, TypeError, "metrics"),
    ("metrics", 1, TypeError, "metrics"),
    ("metrics", "accuracy", TypeError, "metrics"),
    ("logit_scale", None, TypeError, "logit_scale"),
    ("logit_scale", 0.0, ValueError, "logit_scale"),
    ("logit_scale", float("nan"), ValueError, "logit_scale"),
    ("logit_scale", "1", TypeError, "logit_scale"),
    ("logit_scale", torch.ones(()), TypeError, "logit_scale"),
    ("softcap", 0.0, ValueError, "softcap"),
    ("softcap", -30.0, ValueError, "softcap"),
    ("softcap", float("inf"), ValueError, "softcap"),
    ("softcap", True, TypeError, "softcap"),
    ("backend", "cuda", ValueError, "backend"),
    ("backend", None, ValueError, "backend"),
    *[
        (name, value, error, name)
        for name in ("safety_row_weight", "ce_row_weight")
        for value, error in [
            (torch.ones(3), ValueError),
            (torch.ones(4, 1), ValueError),
            (torch.ones((), dtype=torch.float32), ValueError),
            (torch.ones(4, dtype=torch.int64), TypeError),
            (torch.ones(4, dtype=torch.bool), TypeError),
            (torch.ones(4, device=META), ValueError),
            (1.0, TypeError),
        ]
    ],
]
LOGITS: list[tuple[str, Any, type[Exception], str]] = [
    ("logits", None, TypeError, "logits"),
    ("logits", torch.zeros(2, 2, 10), ValueError, "logits"),
    ("logits", torch.zeros(10), ValueError, "logits"),
    ("logits", torch.zeros(4, 10, dtype=torch.int64), TypeError, "logits"),
    ("logits", torch.zeros(4, 10, dtype=torch.complex64), TypeError, "logits"),
    ("logits", torch.zeros(5, 10), ValueError, "target"),
    ("logits", torch.zeros(4, 10, device=META), ValueError, "target"),
    ("inplace", None, TypeError, "inplace"),
    ("inplace", 1, TypeError, "inplace"),
]
LINEAR: list[tuple[str, Any, type[Exception], str]] = [
    ("hidden", None, TypeError, "hidden"),
    ("hidden", torch.zeros(2, 2, 6), ValueError, "hidden"),
    ("hidden", torch.zeros(4, 6, dtype=torch.int64), TypeError, "hidden"),
    ("hidden", torch.zeros(4, 6, dtype=torch.bfloat16), TypeError, "linear_weight"),
    ("hidden", torch.zeros(4, 6, device=META), ValueError, "linear_weight"),
    ("linear_weight", None, TypeError, "linear_weight"),
    ("linear_weight", torch.zeros(6, 10), ValueError, "linear_weight"),
    ("linear_weight", torch.zeros(10), ValueError, "linear_weight"),
    ("linear_weight", torch.zeros(10, 6, dtype=torch.float64), TypeError, "linear_weight"),
    ("linear_weight", torch.zeros(10, 6, dtype=torch.int8), TypeError, "linear_weight"),
    ("linear_weight", torch.zeros(10, 6, device=META), ValueError, "linear_weight"),
    ("linear_bias", 0.0, TypeError, "linear_bias"),
    ("linear_bias", torch.zeros(6), ValueError, "linear_bias"),
    ("linear_bias", torch.zeros(10, dtype=torch.bfloat16), TypeError, "linear_bias"),
    ("linear_bias", torch.zeros(10, dtype=torch.int64), TypeError, "linear_bias"),
    ("linear_bias", torch.zeros(10, device=META), ValueError, "linear_bias"),
    ("low_rank", torch.zeros(4, 2), TypeError, "low_rank"),
    ("low_rank", (torch.zeros(4, 2),), TypeError, "low_rank"),
    ("low_rank", (torch.zeros(4, 2),) * 3, TypeError, "low_rank"),
    ("low_rank", "lora", TypeError, "low_rank"),
    ("low_rank", (torch.zeros(4, 2), None), TypeError, "low_rank"),
    ("low_rank", (None, None), TypeError, "low_rank"),
    ("low_rank", (torch.zeros(3, 2), torch.zeros(10, 2)), ValueError, "low_rank"),
    ("low_rank", (torch.zeros(4, 2), torch.zeros(9, 2)), ValueError, "low_rank"),
    ("low_rank", (torch.zeros(4, 2), torch.zeros(2, 10)), ValueError, "low_rank"),
    ("low_rank", (torch.zeros(4, 2), torch.zeros(10, 3)), ValueError, "low_rank"),
    ("low_rank", (torch.zeros(4), torch.zeros(10)), ValueError, "low_rank"),
    ("low_rank", (torch.zeros(4, 2).bfloat16(), torch.zeros(10, 2)), TypeError, "low_rank"),
    ("low_rank", (torch.zeros(4, 2), torch.zeros(10, 2).double()), TypeError, "low_rank"),
    ("low_rank", (torch.zeros(4, 2).long(), torch.zeros(10, 2).long()), TypeError, "low_rank"),
    (
        "low_rank",
        (torch.zeros(4, 2, device=META), torch.zeros(10, 2)),
        ValueError,
        "low_rank",
    ),
    (
        "low_rank",
        (torch.zeros(4, 2), torch.zeros(10, 2, device=META)),
        ValueError,
        "low_rank",
    ),
    ("pack_rows", 1, TypeError, "pack_rows"),
    ("pack_rows", "auto", TypeError, "pack_rows"),
    ("chunk_bytes", 63, ValueError, "chunk_bytes"),  # a row of 10 is padded to 16, of 4 bytes
    ("chunk_bytes", 0, ValueError, "chunk_bytes"),
    ("chunk_bytes", -1, ValueError, "chunk_bytes"),
    ("chunk_bytes", True, TypeError, "chunk_bytes"),
    ("chunk_bytes", 1e9, TypeError, "chunk_bytes"),
    ("chunk_bytes", "1 GB", TypeError, "chunk_bytes"),
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
        {"num_items": 0},
        {"num_items": torch.tensor(3)},
        {"num_safety_items": 0.0},
        {"softcap": 30},
        {"logit_scale": 2},
        {"label_smoothing": 0},
        {"label_smoothing": 0.999},
        {"z_loss_weight": 1},
        {"metrics": True},
        {"ref_safety_logits": torch.zeros(3)},
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


def test_messages_say_what_was_wrong() -> None:
    given = good(safety_cross_entropy)
    with pytest.raises(ValueError, match=r"must have shape \(4,\); got \(3,\)"):
        safety_cross_entropy(**{**given, "target": torch.zeros(3, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"must be in \[0, 10\) or -100 .*; got 10 in row 2"):
        safety_cross_entropy(**{**given, "target": torch.tensor([0, 1, 10, 11])})
    with pytest.raises(ValueError, match=r"must be distinct; got \[2\] more than once"):
        safety_cross_entropy(**{**given, "safety_ids": torch.tensor([2, 5, 2])})
    with pytest.raises(ValueError, match=r"must have shape \(4, 3\) or \(3,\); got shape \(4, 4\)"):
        safety_cross_entropy(**{**given, "ref_safety_logits": torch.zeros(4, 4)})
    with pytest.raises(ValueError, match=r"must be one of auto, triton, .*, eager; got 'cuda'"):
        safety_cross_entropy(**given, backend="cuda")


PENALTIES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"weight": -0.1}, ValueError, "weight"),
    ({"weight": float("nan")}, ValueError, "weight"),
    ({"weight": float("inf")}, ValueError, "weight"),
    ({"weight": "0.1"}, TypeError, "weight"),
    ({"weight": True}, TypeError, "weight"),
    ({"weight": None}, TypeError, "weight"),
    ({"weight": torch.ones(1)}, ValueError, "weight"),
    ({"weight": torch.ones((), dtype=torch.int64)}, TypeError, "weight"),
    ({"kind": "MSE"}, ValueError, "kind"),
    ({"kind": None}, ValueError, "kind"),
    ({"kind": "kl"}, ValueError, "kind"),
    ({"kind": ["mse"]}, ValueError, "kind"),
    *[
        ({name: value}, error, name)
        for name in ("temperature", "delta")
        for value, error in [
            (0.0, ValueError),
            (0, ValueError),
            (-1.0, ValueError),
            (float("nan"), ValueError),
            (float("inf"), ValueError),
            (None, TypeError),
            ("1", TypeError),
            (True, TypeError),
            (torch.ones(()), TypeError),
        ]
    ],
    ({"id_weights": torch.zeros(3)}, ValueError, "id_weights"),
    ({"id_weights": [1.0]}, TypeError, "id_weights"),
    ({"id_weights": torch.ones(3, dtype=torch.int64)}, TypeError, "id_weights"),
    ({"id_weights": torch.ones(3, 1)}, ValueError, "id_weights"),
    ({"id_weights": torch.tensor([1.0, -1.0])}, ValueError, "id_weights"),
    ({"id_weights": torch.tensor([1.0, float("nan")])}, ValueError, "id_weights"),
    ({"id_weights": torch.tensor([1.0, float("inf")])}, ValueError, "id_weights"),
]
TOKENS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"ids": None}, TypeError, "ids"),
    ({"ids": "abc"}, TypeError, "ids"),
    ({"ids": 1.5}, TypeError, "ids"),
    ({"ids": [1, 2.0]}, TypeError, "ids"),
    ({"ids": [1, True]}, TypeError, "ids"),
    ({"ids": [[1, 2]]}, TypeError, "ids"),
    ({"ids": torch.tensor([[1, 2]])}, ValueError, "ids"),
    ({"ids": torch.tensor([1, 2], dtype=torch.int32)}, TypeError, "ids"),
    ({"ids": [1, -1]}, ValueError, "ids"),
    ({"ids": [1, 2, 1]}, ValueError, "ids"),
    ({"ids": [1, 5], "vocab_size": 5}, ValueError, "ids"),
    ({"ids": [1, 2], "id_weights": [1.0]}, ValueError, "id_weights"),
    ({"ids": [1, 2], "id_weights": torch.ones(2, 1)}, ValueError, "id_weights"),
    ({"ids": [1, 2], "id_weights": [1.0, -1.0]}, ValueError, "id_weights"),
    ({"ids": [1, 2], "id_weights": [1.0, float("nan")]}, ValueError, "id_weights"),
    ({"ids": [1, 2], "pieces": ("a",)}, ValueError, "pieces"),
]


@pytest.mark.parametrize(
    ("cls", "options", "error", "name"),
    [(SafetyPenalty, *row) for row in PENALTIES] + [(SafetyTokens, *row) for row in TOKENS],
    ids=label,
)
def test_a_bad_option_is_named_when_it_is_made(cls, options, error, name) -> None:
    with pytest.raises(error) as caught:
        cls(**options)
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


def test_messages_of_the_new_options_say_what_was_wrong() -> None:
    given = good(safety_linear_cross_entropy)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\); got 1.0"):
        safety_linear_cross_entropy(**given, label_smoothing=1.0)
    with pytest.raises(ValueError, match=r"must be finite and >= 0; got -1.0"):
        safety_linear_cross_entropy(**given, z_loss_weight=-1.0)
    with pytest.raises(ValueError, match="must be 'mean', 'sum' or 'none'; got 'max'"):
        safety_linear_cross_entropy(**given, reduction="max")
    with pytest.raises(ValueError, match=r"must be at least 64.*; got 63"):
        safety_linear_cross_entropy(**given, chunk_bytes=63)
    pair = (torch.zeros(4, 2), torch.zeros(10, 3))
    with pytest.raises(ValueError, match=r"low_rank.* must have shape \(10, 2\); got \(10, 3\)"):
        safety_linear_cross_entropy(**given, low_rank=pair)
    with pytest.raises(ValueError, match="must not all be 0"):
        SafetyPenalty(id_weights=torch.zeros(2))
    with pytest.raises(
        ValueError, match="mse, huber, hinge, centered, logprob, subset_kl, coarse_kl; got"
    ):
        SafetyPenalty(kind="l2")
