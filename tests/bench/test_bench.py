"""The speed bench at a toy size: its rows, and who is not timed and why."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys

import pytest
import torch

from bench import check
from bench.inputs import draw_inputs
from bench.memory import child
from bench.steps import speed
from bench.steps.heads import HEADS, HeadShape
from bench.steps.providers import EAGER, Provider, by_hand, missing, providers
from bench.steps.speed import Job, measure, penalty_pairs
from bench.steps.timing import rounds

SMALL = HeadShape(vocab=307, width=32)
CAPPED = HeadShape(vocab=307, width=32, logit_scale=0.5, softcap=3.0)
# torch.compile takes seconds, TRL's imports too
QUICK = ("eager", "two", "F.", "ours (torch)", "ours (triton)")

pytestmark = pytest.mark.usefixtures("clean_memory")

linux = pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")


def with_provider(monkeypatch, loss, **more):
    """Let the suite have one provider more."""
    found = [EAGER, Provider("another", loss, **more)]
    monkeypatch.setattr(speed, "providers", lambda **_: found)


def row_of(rows, name):
    return next(row for row in rows if row["provider"] == name)


@pytest.mark.parametrize("train_head", [False, True])
def test_rows_say_what_was_measured(train_head):
    job = Job(SMALL, 40, 5, torch.float32, train_head)
    rows = measure(job, 3, only=QUICK, memory=False)
    assert {row["provider"] for row in rows} > {"eager", "two full logits", "bare products"}
    for row in rows:
        assert (row["N"], row["V"], row["K"], row["rounds"]) == (40, 307, 5, 3)
        assert row["torch"] == torch.__version__ and row["device"] and row["date"] and row["commit"]
        assert "3 rounds" in row["protocol"]
        assert row["train_head"] is train_head
        if row["status"] == "timed":
            assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
            assert row["against_products"] > 0
    assert row_of(rows, "eager")["against_eager"] == 1.0
    assert row_of(rows, "bare products")["against_products"] == 1.0
    ours = row_of(rows, "ours (torch)")
    assert ours["gradient_error"] <= 1e-5 and ours["version"].startswith("str-kernels ")


def test_the_interpreter_is_not_timed():
    rows = measure(Job(SMALL, 8, 5), 1, only=["ours (triton)"], memory=False)
    triton = row_of(rows, "ours (triton)")
    assert triton["status"] == "absent" and "interpreter is not timed" in triton["why"]
    assert triton["median_ms"] is None


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda x: 1.2 * by_hand(x), "loss off by 2.0e-01"),
        (lambda x: by_hand(x) * float("nan"), "nan"),
        # the loss of the hidden states is right, the gradient is not
        (lambda x: by_hand(x) + 1e-2 * (x.hidden - x.hidden.detach()).sum(), "gradient by"),
        # and here only the head's
        (lambda x: by_hand(x) + 1e-1 * (x.head - x.head.detach()).sum(), "gradient by"),
    ],
)
def test_a_wrong_provider_is_listed_with_its_error_and_not_timed(spoil, said, monkeypatch):
    with_provider(monkeypatch, spoil)
    rows = measure(Job(SMALL, 40, 5, torch.float32, train_head=True), 2, memory=False)
    wrong = row_of(rows, "another")
    assert wrong["status"] == "wrong" and said in wrong["why"]
    assert wrong["median_ms"] is None and wrong["against_eager"] is None
    assert row_of(rows, "eager")["status"] == "timed"


def test_a_crash_at_the_check_is_one_line(monkeypatch):
    def crash(x):
        raise RuntimeError("no kernel\nfor this device\n")

    with_provider(monkeypatch, crash)
    row = row_of(measure(Job(SMALL, 8, 5), 1, memory=False), "another")
    assert (row["status"], row["why"]) == ("failed", "RuntimeError: no kernel")


def test_a_crash_at_full_size_ends_one_provider_only(monkeypatch):
    def crash_at_full_size(x):
        if x.hidden.shape[0] > check.ROWS:
            raise MemoryError("too many rows")
        return by_hand(x)

    with_provider(monkeypatch, crash_at_full_size)
    rows = measure(Job(SMALL, check.ROWS + 1, 5), 2, memory=False)
    row = row_of(rows, "another")
    assert (row["status"], row["why"]) == ("failed", "MemoryError: too many rows")
    assert row_of(rows, "eager")["status"] == "timed"


def test_absent_for_a_reason():
    small = draw_inputs(SMALL, 4, 3)
    capped = draw_inputs(CAPPED, 4, 3)
    scaled = draw_inputs(CAPPED._replace(softcap=None), 4, 3)
    ask = {
        "no softcap": (Provider("a", by_hand, caps=False), capped),
        "no logit scale": (Provider("b", by_hand, caps=False, caps_without_scale=True), scaled),
        "package no_such_thing is not installed": (
            Provider("c", by_hand, needs=("no_such_thing",)),
            small,
        ),
        "has no F.no_such_thing": (Provider("d", by_hand, needs=("F.no_such_thing",)), small),
        "needs a GPU": (Provider("e", by_hand, needs=("gpu",)), small),
    }
    for reason, (provider, inputs) in ask.items():
        assert reason in missing(provider, inputs)
    for inputs in (small, capped, scaled):
        assert missing(EAGER, inputs) is None
    verdict = check.check([EAGER], small, free_bytes=10)["eager"]
    assert verdict.status == "absent" and "GB" in verdict.why


@pytest.mark.parametrize("place", [0, 1])
def test_a_nan_in_any_gradient_is_wrong(place):
    def broken(inputs):
        leaf = inputs.leaves()[place]
        nothing = (leaf - leaf.detach()).sqrt().sum()  # whose gradient is 0 times infinity
        return by_hand(inputs) + 0 * nothing

    inputs = draw_inputs(SMALL, 4, 3, torch.float32, train_head=True)
    verdict = check.check([Provider("broken", broken)], inputs)["broken"]
    assert verdict.status == "wrong" and math.isnan(verdict.gradient_error)


@pytest.mark.parametrize("name", ["two full logits", "TRL", "ours (torch)", "ours (torch), all"])
def test_scale_and_cap_are_those_of_the_head(name):
    """Nothing else would show that a provider leaves them out: the other heads have none."""
    found = [p for p in providers(all_options=True) if p.name.startswith(name)]
    inputs = draw_inputs(CAPPED, 40, 5, torch.float32, train_head=True, log_probs=True)
    if why := missing(found[0], inputs):
        pytest.skip(why)
    for provider, verdict in check.check(found, inputs).items():
        assert verdict.status == "right", f"{provider}: {verdict}"

    for left_out in ({"softcap": None}, {"logit_scale": 1.0}):
        other = CAPPED._replace(**left_out)
        careless = Provider("careless", lambda x, o=other: by_hand(dataclasses.replace(x, shape=o)))
        assert check.check([careless], inputs)["careless"].status == "wrong"
    assert HEADS["gemma-2"].softcap == 30.0


def test_the_rounds_turn():
    order: list[str] = []
    steps = {name: functools.partial(order.append, name) for name in "abc"}
    times, failed = rounds(steps, 2, "cpu")
    assert "".join(order) == "abc" + "bca" + "cab"  # the first round warms up
    assert not failed and all(len(seconds) == 2 for seconds in times.values())


def test_penalty_pairs_are_ours_with_against_without():
    rows = penalty_pairs(Job(SMALL, 40, 5), 5, only=QUICK)
    torch_row = row_of(rows, "ours (torch)")
    assert 0 < torch_row["low_ratio"] <= torch_row["median_ratio"] <= torch_row["high_ratio"]
    assert row_of(rows, "ours (triton)")["status"] == "absent"


@linux
def test_the_peak_of_eager_is_that_of_its_logits():
    shape, tokens = HeadShape(20_000, 8), 400
    logits = 4 * tokens * shape.vocab
    peak = child.peak_in_child("eager", shape, tokens, 4, torch.float32)
    # the logits, their log-softmax, and its gradient while that of the logits is made
    assert 2 * logits < peak < 5 * logits


def test_a_failed_child_is_an_error_with_its_reason():
    with pytest.raises(RuntimeError, match=r"memory of nobody failed: ValueError: .*got 'nobody'"):
        child.peak_in_child("nobody", SMALL, 1, 1)


def test_heads_are_json():
    """A child is handed its head so."""
    assert HeadShape(*json.loads(json.dumps(CAPPED))) == CAPPED
