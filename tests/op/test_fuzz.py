"""Shapes, options and mistakes at random, by hypothesis, which shrinks what fails."""

from __future__ import annotations

import itertools
import os
import re
from typing import Any

import hypothesis
import pytest
import torch
from cases import DTYPES, KINDS, OF_ROWS, PATHS, SEED_VARIABLE, Case, make_case, present
from hypothesis import strategies as st
from tolerance import assert_matches_truth

from str_kernels import (
    SafetyLoss,
    SafetyPenalty,
    safety_cross_entropy,
    safety_linear_cross_entropy,
    safety_log_probs,
)

CPU = torch.device("cpu")
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "path": st.sampled_from(PATHS),
    "dtype": st.sampled_from([*DTYPES.values()]),
    "rows": st.integers(0, 9),
    "vocab": st.integers(1, 70),
    "ids": st.none() | st.integers(0, 70),
    "dim": st.integers(1, 9),
    "rank": st.integers(0, 4),
    "transform": st.sampled_from(["none", "scale", "cap", "scale+cap"]),
    "ref": st.sampled_from(["row", "shared"]),
    "ref_dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    "safety_rows": st.sampled_from(["default", "mask", "weights"]),
    "ce_rows": st.sampled_from(["default", "weights"]),
    "id_weights": st.booleans(),
    "kind": st.sampled_from(KINDS),
    "label_smoothing": st.sampled_from([0.0, 0.0, 0.1, 0.9]),
    "z_loss_weight": st.sampled_from([0.0, 0.0, 1e-4, 0.1]),
    "metrics": st.booleans(),
    "counts": st.sampled_from(["default", "numbers", "tensors"]),
    "reduction": st.sampled_from(["mean", "sum", "none"]),
    "penalty_weight": st.sampled_from(["number", "tensor"]),
    "pack_rows": st.sampled_from([None, True, False]),
}
ANY = st.fixed_dictionaries(OPTIONS)
ON_TRITON = st.fixed_dictionaries(
    {**OPTIONS, "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16])}
)
# The seed is the session's: each run looks elsewhere, and STR_TEST_SEED looks there again. No
# database, which would be a folder in the tree; no deadline, since a first call may be slow.
SEED = int(os.environ[SEED_VARIABLE])
HOUSE = {"deadline": None, "database": None, "print_blob": True}


def case_of(options: dict[str, Any], seed: int, chunk_rows: int | None = None) -> Case:
    ids = options["ids"]
    options = {**options, "ids": ids if ids is None else min(ids, options["vocab"])}
    case = make_case(torch.Generator().manual_seed(seed), CPU, **options)
    if case.linear and chunk_rows is not None:
        row_bytes = -(-options["vocab"] // 16) * 16 * case.dtype.itemsize
        case = case.with_options(chunk_bytes=chunk_rows * row_bytes)
    return case


@hypothesis.seed(SEED)
@hypothesis.settings(max_examples=120, **HOUSE)
@hypothesis.given(ANY, st.integers(0, 2**32), st.integers(1, 10))
def test_any_shape_and_options_match_the_truth(options, seed: int, chunk_rows: int) -> None:
    case = case_of(options, seed, chunk_rows)
    assert_matches_truth(case, case.run("torch"), "torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a CPU, in the interpreter")
@hypothesis.seed(SEED)
@hypothesis.settings(max_examples=25, **HOUSE)
@hypothesis.given(ON_TRITON, st.integers(0, 2**32), st.integers(1, 10))
def test_any_shape_and_options_on_triton(options, seed: int, chunk_rows: int) -> None:
    case = case_of({**options, "rows": min(options["rows"], 5)}, seed, chunk_rows)
    assert_matches_truth(case, case.run("triton"), "triton")


@hypothesis.seed(SEED)
@hypothesis.settings(max_examples=40, **HOUSE)
@hypothesis.given(ANY, st.integers(0, 2**32), st.data())
def test_rows_can_be_dealt_out_in_any_way(options, seed: int, data: st.DataObject) -> None:
    """The sum over any partition of the rows is the sum over all, in float64."""
    options = {**options, "dtype": torch.float64, "reduction": "sum"}
    case = case_of(options, seed)
    rows = len(case.target)
    hand = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=rows, max_size=rows)))
    parts = [case.rows((hand == i).nonzero().squeeze(1)) for i in range(3)]
    total = sum(part.run("torch").terms.loss for part in parts)
    torch.testing.assert_close(total, case.run("torch").terms.loss, rtol=1e-12, atol=1e-14)


@hypothesis.seed(SEED)
@hypothesis.settings(max_examples=40, **HOUSE)
@hypothesis.given(ANY, st.integers(0, 2**32), st.randoms(use_true_random=False))
def test_the_order_of_rows_and_ids_does_not_matter(options, seed: int, shuffle: Any) -> None:
    """Rows in any order, and ids with their references and weights, in float64."""
    case = case_of({**options, "dtype": torch.float64}, seed)
    rows = list(range(len(case.target)))
    shuffle.shuffle(rows)
    order = torch.tensor(rows, dtype=torch.int64)
    other = case.rows(order)
    if case.ids is not None:
        ids = list(range(len(case.ids)))
        shuffle.shuffle(ids)
        columns = torch.tensor(ids, dtype=torch.int64)
        penalty = vars(case.options["penalty"])
        if penalty["id_weights"] is not None:
            penalty = {**penalty, "id_weights": penalty["id_weights"][columns]}
        other = other.changed(ids=case.ids[columns], ref=other.ref[..., columns])
        other = other.with_options(penalty=SafetyPenalty(**penalty))
    got, wanted = other.run("torch"), case.run("torch")
    close = {"rtol": 1e-10, "atol": 1e-12}
    for mine, term in zip(present(got.terms), present(wanted.terms), strict=True):
        term = term[order] if term.dim() else term
        torch.testing.assert_close(mine, term, **close)
    for name, grad in wanted.grads.items():
        grad = grad[order] if name in OF_ROWS else grad
        torch.testing.assert_close(got.grads[name], grad, **close)


# Malformed arguments: a right result, or TypeError or ValueError that begins with the name of an
# argument. Anything else (torch's own errors, a crash, a result of the wrong shape) is a bug.

NAMED = re.compile(r"^`\w+(\[\d\])?` must ")


def tensors() -> st.SearchStrategy[torch.Tensor]:
    """Small tensors of any shape, dtype, layout and place, legal ones among them."""
    shapes = st.sampled_from(
        [(), (0,), (3,), (4,), (10,), (4, 10), (10, 6), (4, 6), (4, 3), (10, 2), (4, 2), (4, 4, 10)]
    )
    whole = (torch.int64, torch.int32, torch.bool)
    wide = (torch.float32, torch.float64, torch.bfloat16, torch.complex64)
    dtypes = st.sampled_from([*whole, *wide])

    def make(shape, dtype, how: str) -> torch.Tensor:
        x = torch.zeros(shape, dtype=dtype)
        if how == "meta":
            return x.to("meta")
        if how == "ones":
            return torch.ones(shape, dtype=dtype)
        if how == "sparse":
            return x.to_sparse()
        if how == "grad" and x.is_floating_point():
            return x.requires_grad_()
        if how == "expanded" and x.dim():
            return x[:1].expand(shape) if shape[0] else x
        return x

    hows = st.sampled_from(["zeros", "zeros", "ones", "meta", "sparse", "grad", "expanded"])
    return st.builds(make, shapes, dtypes, hows)


NUMBERS = st.sampled_from(
    [0, 1, -1, 2, 0.5, 1.0, 1e-3, 1e30, 1e39, float("nan"), float("inf"), 2**70, 10**400]
)
WORDS = st.sampled_from(["mean", "sum", "none", "max", "auto", "torch", "eager", "cuda", ""])
ANYTHING = (
    tensors()
    | NUMBERS
    | WORDS
    | st.none()
    | st.booleans()
    | st.lists(tensors(), max_size=3)
    | st.tuples(tensors(), tensors())
    | st.sampled_from([SafetyPenalty(), SafetyPenalty(kind="logprob"), object(), int, b"x"])
    | st.just(torch.ones(2).numpy())
)
PAIRS = st.tuples(tensors(), tensors())


def almost(x: Any) -> st.SearchStrategy[Any]:
    """What is right but for one thing."""
    if isinstance(x, tuple):
        return st.tuples(*(almost(part) | st.just(part) for part in x))
    if not isinstance(x, torch.Tensor):
        return ANYTHING
    of_dtype = (x.double(), x.bfloat16(), x.half(), x.to(torch.int32), x.to(torch.float8_e4m3fn))
    of_shape = (x[:-1], x[None], x[..., None], x.t().contiguous().t(), x[:1].expand(x.shape))
    others = (x.to("meta"), x.to_sparse(), torch.nn.Parameter(x.double()), x.tolist(), x.numpy())
    return st.sampled_from([*of_dtype, *of_shape, *others])


SHARED = """target safety_ids ref_safety_logits penalty safety_row_weight ce_row_weight num_items
    num_safety_items ignore_index reduction label_smoothing z_loss_weight logit_scale softcap
    metrics backend""".split()
OF_HEAD = ("hidden", "linear_weight", "linear_bias", "low_rank", "chunk_bytes")
FUNCTIONS = {
    safety_cross_entropy: ("logits", "inplace", *SHARED),
    safety_linear_cross_entropy: (*OF_HEAD, "pack_rows", *SHARED),
    safety_log_probs: (*OF_HEAD, "safety_ids", "logit_scale", "softcap", "backend"),
}


def right(function: Any) -> dict[str, Any]:
    ids = {"safety_ids": torch.tensor([2, 5, 0])}
    head = {"hidden": torch.zeros(4, 6), "linear_weight": torch.zeros(10, 6)}
    if function is safety_log_probs:
        return {**head, **ids}
    more = {**ids, "target": torch.tensor([0, 1, -100, 9]), "ref_safety_logits": torch.zeros(4, 3)}
    if function is safety_cross_entropy:
        return {"logits": torch.zeros(4, 10), **more}
    return {**head, **more, "low_rank": (torch.zeros(4, 2), torch.zeros(10, 2))}


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")  # torch's, on the first sparse tensor
@pytest.mark.parametrize("function", FUNCTIONS)
@hypothesis.seed(SEED)
@hypothesis.settings(max_examples=150, **HOUSE)
@hypothesis.given(st.data())
def test_a_malformed_call_is_named_or_works(function: Any, data: st.DataObject) -> None:
    given = right(function)
    for name in data.draw(st.lists(st.sampled_from(FUNCTIONS[function]), max_size=3, unique=True)):
        anything = PAIRS | ANYTHING if name == "low_rank" else ANYTHING
        given[name] = data.draw(almost(given.get(name)) | anything, label=name)
    try:
        result = function(**given)
    except (TypeError, ValueError) as error:
        assert NAMED.match(str(error)), f"{type(error).__name__}: {error}"
        return
    if function is safety_log_probs:
        assert result.shape == (given["hidden"].shape[0], len(given["safety_ids"]))
        return
    assert isinstance(result, SafetyLoss)
    each = given.get("reduction") == "none"
    for term in present(result):
        assert term.shape == (given["target"].shape if each else ())
        assert term.dtype in (torch.float32, torch.float64)
    if result.loss.requires_grad and result.loss.device.type == "cpu":
        result.loss.sum().backward()
        for x in given.values():
            if isinstance(x, torch.Tensor) and x.grad is not None:
                assert (x.grad.shape, x.grad.dtype) == (x.shape, x.dtype)


def test_shapes_can_be_tried_out_on_meta() -> None:
    """Autocast knows no device "meta", and the package's products are made outside autocast."""
    for function, reduction in itertools.product(FUNCTIONS, ("mean", "none")):
        given = right(function)
        low_rank = tuple(x.to("meta") for x in given.pop("low_rank", ()))
        given = {name: x.to("meta") for name, x in given.items()}
        if low_rank:
            given["low_rank"] = low_rank
        for backend in ("torch", "eager"):
            if function is safety_log_probs:
                assert function(**given, backend=backend).shape == (4, 3)
                continue
            loss = function(**given, reduction=reduction, backend=backend).loss
            assert loss.is_meta and loss.shape == ((4,) if reduction == "none" else ())


# torch.tensor itself refuses an int past 64 bits
WEIGHTS = st.sampled_from([0.0, 1.0, 0.5]) | NUMBERS.filter(lambda x: isinstance(x, float) or x < 3)


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@hypothesis.seed(SEED)
@hypothesis.settings(max_examples=100, **HOUSE)
@hypothesis.example({"weight": torch.ones((), device="meta")})
@hypothesis.example({"weight": torch.ones(()).to_sparse()})
@hypothesis.example({"weight": 1e39})  # past float32
@hypothesis.example({"delta": 10**400})  # past every float
@hypothesis.example({"kind": torch.ones(2).numpy()})
@hypothesis.example({"id_weights": torch.ones(3, device="meta")})
@hypothesis.example({"id_weights": torch.ones(3).to_sparse()})
@hypothesis.given(
    st.fixed_dictionaries(
        {},
        optional={
            "weight": ANYTHING,
            "kind": st.sampled_from(KINDS) | ANYTHING,
            "temperature": ANYTHING,
            "delta": ANYTHING,
            "id_weights": ANYTHING | st.lists(WEIGHTS, min_size=1, max_size=3).map(torch.tensor),
        },
    )
)
def test_a_malformed_penalty_is_named_or_works(options: dict[str, Any]) -> None:
    try:
        penalty = SafetyPenalty(**options)
    except (TypeError, ValueError) as error:
        assert NAMED.match(str(error)), f"{type(error).__name__}: {error}"
        return
    ids = 3 if penalty.id_weights is None else len(penalty.id_weights)
    if ids > 10:
        return
    logits = torch.zeros(4, 10)
    given = (logits, torch.zeros(4, dtype=torch.int64), torch.arange(ids), torch.zeros(4, ids))
    try:
        assert isinstance(
            safety_cross_entropy(*given, penalty=penalty, backend="torch"), SafetyLoss
        )
    except (TypeError, ValueError) as error:
        assert NAMED.match(str(error)), f"{type(error).__name__}: {error}"
