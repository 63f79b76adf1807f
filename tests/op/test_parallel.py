"""A vocabulary spread over 2 and 4 gloo ranks against float64 eager in one process.

The ranks are started once and run every case of parallel_cases.py; here their results are compared.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import Result
from parallel_cases import CASES, DIM, MUTANTS, OF_HEAD, RANK, VOCAB, edges, in_a_graph, on_a_rank
from ranks import run_ranks
from tolerance import OutOfTolerance, assert_matches_truth

from str_kernels.op.functional import safety_log_probs
from str_kernels.op.projection import project

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed package")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each rank found, by name."""
    folder = tmp_path_factory.mktemp("ranks")
    of_ranks = run_ranks(4, on_a_rank, CASES, folder=folder)
    return {name: [of_rank[name] for of_rank in of_ranks] for name in of_ranks[0]}


def whole(results: list[Result]) -> Result:
    """Put the ranks' parts together; what is the same on all of them must be, in every bit."""
    first = results[0]
    for result in results[1:]:
        for mine, theirs in zip(result.terms, first.terms, strict=True):
            assert (mine is None and theirs is None) or same_bits(mine, theirs)
    grads = {}
    for name in first.grads:
        of_ranks = [result.grads[name] for result in results]
        if name in OF_HEAD:
            grads[name] = torch.cat(of_ranks)
        else:
            assert all(same_bits(grad, of_ranks[0]) for grad in of_ranks), name
            grads[name] = of_ranks[0]
    return Result(first.terms, grads)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("name", CASES)
def test_every_pair_of_options(name: str, found) -> None:
    case, sizes = CASES[name]
    results = [result for result, _ in found[name]][: len(sizes)]
    assert_matches_truth(case, whole(results), "torch")


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name: str, found) -> None:
    case, _ = CASES["plain"]
    first = found[name][0]
    grads = {
        leaf: torch.cat([result.grads[leaf] for result in found[name]])
        if leaf in OF_HEAD
        else first.grads[leaf]
        for leaf in first.grads
    }
    with pytest.raises(OutOfTolerance):
        assert_matches_truth(case, Result(first.terms, grads), "torch")


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_exchanged(name: str, found) -> None:
    case, sizes = CASES[name]
    ranks, item = len(sizes), 8 if case.dtype == torch.float64 else 4
    rows, options = case.target.shape[0], case.options
    kept = case.target != options["ignore_index"]
    weights = options.get("safety_row_weight"), options.get("ce_row_weight")
    of_ce = kept if weights[1] is None else kept & (weights[1] != 0)
    takes_part = of_ce | (kept if weights[0] is None else weights[0] != 0)
    packed = int(takes_part.sum()) if options["pack_rows"] is None else rows
    columns = 3 + (options["label_smoothing"] > 0) + 2 * options["metrics"]
    passes = 2 if options["reduction"] == "none" else 1  # a second in backward
    ids = 0 if case.ids is None else len(case.ids)
    wide = DIM + (RANK if "low_rank_t" in case.leaves else 0)
    for _, counted in found[name]:
        assert counted["gathered"] == passes * packed * columns * item * ranks + ranks * 8
        assert counted["reduced"] == rows * item * (passes * ids + wide)


def test_references(found) -> None:
    case, _ = CASES["plain"]
    leaves = case.live_leaves()
    hidden, weight = leaves["hidden"], leaves["linear_weight"]
    options = {"low_rank": (leaves["low_rank_t"], leaves["low_rank_b"]), "logit_scale": 1.3}
    z = project(hidden, weight, case.ids, softcap=5.0, **options)
    z.square().sum().backward()
    log_probs = safety_log_probs(hidden, weight, case.ids, softcap=5.0, **options)
    for of_rank in found["equal"]:
        assert torch.equal(of_rank["z"], z.detach())
        torch.testing.assert_close(of_rank["log_probs"], log_probs)
    for name, leaf in leaves.items():
        of_ranks = [of_rank[name] for of_rank in found["equal"]]
        grad = torch.cat(of_ranks) if name in OF_HEAD else of_ranks[0]
        torch.testing.assert_close(grad, leaf.grad, msg=name)


def test_dtensors_are_taken_as_they_are(found) -> None:
    case, _ = CASES["plain"]
    first = found["dtensor"][0]
    assert_matches_truth(case, first["result"], "torch")
    alone = project(case.leaves["hidden"], case.leaves["linear_weight"], case.ids)
    for of_rank in found["dtensor"]:
        for mine, theirs in zip(of_rank["result"].terms, first["result"].terms, strict=True):
            assert same_bits(mine, theirs)
        assert torch.equal(of_rank["z"], alone)
        assert "must be placed on `process_group`" in of_rank["refused"]["another group"]
        assert "gather it first" in of_rank["refused"]["replicated"]


def test_autocast(found) -> None:
    case, _ = CASES["plain"]
    alone = case.run("torch", autocast=torch.bfloat16)
    got = whole(found["autocast"])
    torch.testing.assert_close(got.terms.loss, alone.terms.loss, rtol=1e-5, atol=0)
    for name, grad in alone.grads.items():
        close = {"rtol": 2e-2, "atol": 2e-2 * float(grad.abs().max())}
        torch.testing.assert_close(got.grads[name], grad, **close)


@pytest.mark.slow
def test_one_graph_holds_the_group_by_its_name(tmp_path) -> None:
    case, _ = CASES["plain"]
    for result in run_ranks(2, in_a_graph, case, folder=tmp_path):
        assert_matches_truth(case, result, "torch")


def test_errors_are_the_same_on_every_rank(found) -> None:
    first = found["errors"][0]
    assert all(of_rank == first for of_rank in found["errors"])
    in_vocabulary = f"`target` must be in [0, {VOCAB}) or -100 (ignore_index); got"
    assert first["high"] == f"ValueError: {in_vocabulary} {VOCAB} in row 4"
    assert first["low"] == f"ValueError: {in_vocabulary} -1 in row 4"
    assert first["ids"] == f"ValueError: `safety_ids` must be in [0, {VOCAB}); got {VOCAB}"
    assert first["ids of the loss"] == first["ids"]
    assert first["group"].startswith("TypeError: `process_group` must be a torch.distributed")
    for backend in ("eager", "compiled", "triton"):
        assert first[backend].startswith("ValueError: `backend` must be 'auto' or 'torch' where")


@pytest.mark.parametrize("name", ["masked", "nothing kept", "a row of NaN", "NaN where ignored",
                                  "no rows"])  # fmt: skip
def test_edges_are_those_of_one_process(name: str, found) -> None:
    alone, got = edges()[name][0].run("torch"), whole(found[name])
    close = {"equal_nan": True, "rtol": 1e-5, "atol": 1e-6}
    for mine, wanted in zip(got.terms, alone.terms, strict=True):
        torch.testing.assert_close(mine, wanted, **close)
    for leaf, wanted in alone.grads.items():
        torch.testing.assert_close(got.grads[leaf], wanted, **close)
