"""Microbenchmarks of each op and row step: `make bench`, then `make bench-compare`.

They are small on purpose, to show within a minute that a change made one piece slower. For the cost
of the whole loss use `python -m bench speed`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.inputs import Inputs, draw_inputs
from bench.steps.heads import HeadShape
from str_kernels import (
    SafetyPenalty,
    project,
    safety_cross_entropy,
    safety_linear_cross_entropy,
)
from str_kernels.op.contracts import RowOptions
from str_kernels.op.rows.rows_torch import row_step_torch

pytest.importorskip("pytest_benchmark", reason="`make bench` installs it")

# Several chunks of the linear path on a CPU, several blocks of a kernel, and no power of two.
TOKENS, IDS, HEAD = 600, 64, HeadShape(vocab=20011, width=256)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """Use one thread, so that other work on the machine matters less."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    """Draw the same inputs in every run."""
    torch.manual_seed(0)
    return draw_inputs(HEAD, TOKENS, IDS, device=DEVICE, train_head=True)


@pytest.fixture
def timed(benchmark: Any) -> Callable[[Callable[[], object]], None]:
    """Time a function, including the device's work."""

    def run(function: Callable[[], object]) -> None:
        def step() -> None:
            function()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark(step)

    return run


@pytest.mark.benchmark(group="row step, torch")
@pytest.mark.parametrize("what", ["forward", "forward+grad", "grad"])
def test_row_step(what: str, inputs: Inputs, timed: Any) -> None:
    """The row step by itself, on 128 rows of logits."""
    rows = 128
    part = inputs.first(rows)
    logits = torch.randn(rows, HEAD.vocab, device=DEVICE).bfloat16()
    one = torch.ones(rows, device=DEVICE)
    given = (
        logits,
        part.target,
        part.ids,
        part.ref + 0.1,
        part.ref,
        torch.ones(IDS, device=DEVICE),
        RowOptions(-100, 1.0, 0.0),
    )
    grads = {"ce_scale": one, "penalty_scale": one, "grad": torch.empty_like(logits)}
    if what == "forward":
        timed(lambda: row_step_torch(*given))
    elif what == "grad":
        norm = row_step_torch(*given).norm
        timed(lambda: row_step_torch(*given, norm=norm, **grads))
    else:
        timed(lambda: row_step_torch(*given, **grads))


@pytest.mark.benchmark(group="logits path")
@pytest.mark.parametrize("what", ["forward", "forward+backward", "inplace"])
def test_logits_path(what: str, inputs: Inputs, timed: Any) -> None:
    """`safety_cross_entropy`, the penalty included."""
    logits = torch.randn(TOKENS, HEAD.vocab, device=DEVICE).bfloat16()
    logits.requires_grad_(what != "forward")

    def step() -> None:
        given = (logits, inputs.target, inputs.ids, inputs.ref)
        terms = safety_cross_entropy(*given, penalty=SafetyPenalty(0.1), inplace=what == "inplace")
        if what != "forward":
            torch.autograd.grad(terms.loss, logits)

    timed(step)


@pytest.mark.benchmark(group="linear path, forward and backward")
@pytest.mark.parametrize("head", ["frozen", "trainable"])
@pytest.mark.parametrize("penalty", ["penalty", "plain"])
def test_linear_path(head: str, penalty: str, inputs: Inputs, timed: Any) -> None:
    """`safety_linear_cross_entropy`."""
    hidden = inputs.hidden.detach().requires_grad_()
    weight = inputs.head.detach().requires_grad_(head == "trainable")
    safety = (inputs.ids, inputs.ref) if penalty == "penalty" else ()

    def step() -> None:
        terms = safety_linear_cross_entropy(
            hidden, weight, inputs.target, *safety, penalty=SafetyPenalty(0.1)
        )
        torch.autograd.grad(terms.loss, [hidden, weight] if head == "trainable" else [hidden])

    timed(step)


@pytest.mark.benchmark(group="project")
@pytest.mark.parametrize("what", ["forward", "forward+backward"])
def test_project(what: str, inputs: Inputs, timed: Any) -> None:
    """`project`, which computes the safety logits of the reference and of the student."""
    hidden = inputs.hidden.detach().requires_grad_(what != "forward")
    weight = inputs.head.detach()

    def step() -> None:
        safety_logits = project(hidden, weight, inputs.ids)
        if what != "forward":
            torch.autograd.grad(safety_logits.sum(), hidden)

    timed(step)
