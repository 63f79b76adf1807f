"""Shapes and options at random on the torch backend, by hypothesis, which shrinks what fails."""

from __future__ import annotations

import os
from typing import Any

import hypothesis
import torch
from cases import SEED_VARIABLE, Case, make_case
from hypothesis import strategies as st
from tolerance import assert_matches_truth

CPU = torch.device("cpu")
OPTIONS = st.fixed_dictionaries(
    {
        "path": st.sampled_from(["logits", "linear", "linear+bias"]),
        "dtype": st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
        "rows": st.integers(0, 9),
        "vocab": st.integers(2, 70),
        "ids": st.none() | st.integers(0, 70),
        "dim": st.integers(1, 9),
        "transform": st.sampled_from(["none", "scale", "cap", "scale+cap"]),
        "ref": st.sampled_from(["row", "shared"]),
        "safety_rows": st.sampled_from(["default", "mask", "weights"]),
        "ce_rows": st.sampled_from(["default", "weights"]),
        "id_weights": st.booleans(),
        "counts": st.sampled_from(["default", "numbers", "tensors"]),
        "reduction": st.sampled_from(["mean", "sum"]),
    }
)


def case_of(options: dict[str, Any], seed: int) -> Case:
    ids = options["ids"]
    options = {**options, "ids": ids if ids is None else min(ids, options["vocab"])}
    return make_case(torch.Generator().manual_seed(seed), CPU, **options)


# The seed is the session's: each run looks elsewhere, and STR_TEST_SEED looks there again. No
# database, which would be a folder in the tree; no deadline, since a first call may be slow.
@hypothesis.seed(int(os.environ[SEED_VARIABLE]))
@hypothesis.settings(max_examples=120, deadline=None, database=None, print_blob=True)
@hypothesis.given(OPTIONS, st.integers(0, 2**32), st.integers(1, 2000))
def test_any_shape_and_options_match_the_truth(options, seed: int, chunk_bytes: int) -> None:
    case = case_of(options, seed)
    if case.linear:
        case = case.with_options(chunk_bytes=chunk_bytes)
    assert_matches_truth(case, case.run("torch"), "torch")


@hypothesis.seed(int(os.environ[SEED_VARIABLE]))
@hypothesis.settings(max_examples=40, deadline=None, database=None, print_blob=True)
@hypothesis.given(OPTIONS, st.integers(0, 2**32), st.data())
def test_rows_can_be_dealt_out_in_any_way(options, seed: int, data: st.DataObject) -> None:
    """The sum over any partition of the rows is the sum over all, in float64."""
    options = {**options, "dtype": torch.float64, "reduction": "sum"}
    case = case_of(options, seed)
    rows = len(case.target)
    hand = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=rows, max_size=rows)))
    parts = [case.rows((hand == i).nonzero().squeeze(1)) for i in range(3)]
    total = sum(part.run("torch").terms.loss for part in parts)
    torch.testing.assert_close(total, case.run("torch").terms.loss, rtol=1e-12, atol=1e-14)
