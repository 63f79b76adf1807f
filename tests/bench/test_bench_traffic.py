"""Bytes counted in Triton's interpreter: the counter itself, and the bounds of our kernels."""

from __future__ import annotations

import importlib.util

import pytest
import torch

pytest.importorskip("triton", reason="an optional dependency outside Linux")
import triton
import triton.language as tl

from bench.memory import traffic

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")

# More than one block of any kernel here, and no multiple of what a load takes at once.
VOCAB, IDS = 3 * 4096 + 155, 64


@triton.jit
def _copy(From, To, Flag, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    value = tl.load(From + offs, mask=offs < N)
    tl.store(To + offs, value.to(tl.float32), mask=offs < N)
    tl.store(To + offs, tl.load(To + offs))  # no mask: the whole block
    tl.store(Flag, 1)
    tl.atomic_add(To, 1.0)


def test_lanes_that_are_on_times_their_size():
    source, to = torch.ones(100).bfloat16(), torch.empty(128)
    flag = torch.zeros(1, dtype=torch.int64)
    with traffic.counting() as counted:
        _copy[(1,)](source, to, flag, 100, BLOCK=128)
        assert flag.item() == 1
    # masked bfloat16, whole block of float32, the atomic
    assert counted.read == 100 * 2 + 128 * 4 + 4
    assert counted.written == 100 * 4 + 128 * 4 + 8 + 4
    _copy[(1,)](source, to, flag, 100, BLOCK=128)
    assert counted.read == 100 * 2 + 128 * 4 + 4, "counted outside"


@pytest.fixture(scope="module")
def rows():
    return traffic.measure(VOCAB, IDS, tokens=3)


@pytest.mark.parametrize("upstream", [1.0, 0.5])
@pytest.mark.parametrize("op", ["ours, logits path", "ours, linear path"])
@pytest.mark.parametrize("penalty", ["", ", no penalty"])
def test_our_bytes_are_within_the_bound(op, upstream, penalty, rows):
    (row,) = [r for r in rows if r["op"] == op + penalty and r["upstream"] == upstream]
    assert row["bytes"] <= traffic.bound(VOCAB, IDS if not penalty else 0)
    assert row["within_bound"]
    # fewer than this, and the counter has missed a pass
    assert row["bytes"] >= traffic.minimum(VOCAB)
    assert row["written"] >= 2 * VOCAB and row["read"] >= 2 * VOCAB


def test_the_penalty_costs_bytes_for_its_ids_only(rows):
    for row in rows:
        if row["op"] in ("ours, logits path", "ours, linear path"):
            per_id = row["penalty_percent"] / 100 * row["bytes"] / IDS
            assert 0 < per_id <= 40, row["op"]


def test_a_row_that_fits_one_program_is_read_once():
    """On the linear path; the largest such row in 16 bits is 32,768 logits."""
    for row in traffic.measure(32768, IDS, tokens=2):
        if row["op"].startswith("ours, linear path"):
            assert traffic.minimum(32768) <= row["bytes"] <= 4 * 32768 + 20 * IDS + 128


def test_the_penalty_adds_less_than_one_percent_at_the_size_of_llama():
    added = {
        row["op"]: row["penalty_percent"]
        for row in traffic.measure(128256, 64, tokens=1)
        if row.get("penalty_percent") is not None
    }
    assert added.keys() == {"ours, logits path", "ours, linear path"}
    assert all(0 < percent < 1 for percent in added.values())


@pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="liger_kernel is not installed"
)
def test_liger_goes_over_its_gradient_again_unless_the_upstream_is_one(rows):
    found = {row["upstream"]: row["of_vocab"] for row in rows if row["op"].startswith("Liger")}
    assert found == {1.0: pytest.approx(6, abs=0.1), 0.5: pytest.approx(10, abs=0.1)}


def test_an_absent_liger_is_a_row_with_the_reason(monkeypatch):
    monkeypatch.setattr(traffic.importlib.util, "find_spec", lambda name: None)
    (row,) = traffic._liger({"N": 1}, torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64))
    assert row["why"] == "package liger_kernel is not installed"


def test_interpret_refuses_a_triton_that_compiles(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match="before TRITON_INTERPRET"):
        traffic.interpret()
