"""reduction "none": one loss per row, each with an upstream gradient of its own."""

from __future__ import annotations

import pytest
import torch
from cases import EXTRAS, KINDS, PATHS, WEIGHTS, Case, assert_same, make_case, present
from tolerance import assert_matches_truth

pytestmark = pytest.mark.gpu

BACKENDS = ["eager", "torch", "triton"]
OURS = ["torch", "triton"]


def none_case(rng, device, path: str = "logits", **options) -> Case:
    return make_case(rng, device, path=path, reduction="none", **{**WEIGHTS, **options})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", PATHS)
def test_a_row_is_what_it_adds_to_the_sum(backend: str, path: str, rng, device) -> None:
    case = none_case(rng, device, path, rows=9, **EXTRAS)
    each = case.run(backend).terms
    total = case.with_options(reduction="sum").changed(row_upstream=None).run(backend).terms
    for name, rows in each._asdict().items():
        assert rows.shape == (9,) and rows.dtype == torch.float32, name
        added = rows.amax() if name == "max_drift" else rows.sum()
        torch.testing.assert_close(added, getattr(total, name), rtol=2e-6, atol=1e-6)
    ignored = case.target == -100
    unheld = case.options["safety_row_weight"] == 0
    for rows in (each.ce, each.token_accuracy, each.entropy):
        assert not rows[ignored].any()
    assert not each.penalty[unheld].any() and not each.max_drift[unheld].any()
    assert bool((each.max_drift[~unheld] > 0).all())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_gradient_it_has_alone(path: str, kind: str, rng, device) -> None:
    """Upstream times the gradient of each row's own loss, added up, in float64."""
    case = none_case(rng, device, path, kind=kind, dtype=torch.float64, rows=6, **EXTRAS)
    got = case.run("torch").grads
    added = {name: torch.zeros_like(x) for name, x in case.leaves.items()}
    for n in range(6):
        row = case.rows(slice(n, n + 1))
        alone = row.with_options(reduction="sum").changed(
            row_upstream=None, upstream=case.upstream * float(case.row_upstream[n])
        )
        for name, grad in alone.run("torch").grads.items():
            if len(grad) == 1 and len(added[name]) == 6:
                added[name][n] = grad[0]
            else:
                added[name] += grad
    for name, grad in got.items():
        torch.testing.assert_close(grad, added[name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_every_dtype(backend: str, path: str, dtype: torch.dtype, rng, device) -> None:
    case = none_case(rng, device, path, dtype=dtype, kind="logprob", vocab=301, rows=8)
    if case.linear:
        case = case.with_options(chunk_bytes=3 * 304 * dtype.itemsize)
    assert_matches_truth(case, case.run(backend), backend)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("path", PATHS)
def test_sum_outside_is_sum_inside(backend: str, path: str, rng, device) -> None:
    """loss.sum(), mean() and a choice of rows: their upstream is expanded, or has zeros."""
    case = none_case(rng, device, path)
    inside = case.with_options(reduction="sum").changed(row_upstream=None)

    def outside(reduce) -> Case:
        leaves = case.live_leaves()
        loss = case.loss(leaves, backend).loss
        (reduce(loss) * case.upstream).backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    grads = outside(lambda loss: loss.sum())
    for name, wanted in inside.run("eager").grads.items():
        torch.testing.assert_close(grads[name], wanted, rtol=1e-5, atol=1e-5)
    mean = outside(lambda loss: loss.mean())
    chosen = outside(lambda loss: loss[1:3].sum())
    of_rows = next(iter(case.leaves))
    for name, grad in grads.items():
        torch.testing.assert_close(mean[name], grad / 7, rtol=1e-5, atol=1e-6)
    assert not chosen[of_rows][[0, 3, 4, 5, 6]].any()
    torch.testing.assert_close(chosen[of_rows][1:3], grads[of_rows][1:3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("path", PATHS)
def test_backward_twice(backend: str, path: str, rng, device) -> None:
    """The second with another upstream: nothing of the first may be left."""
    case = none_case(rng, device, path)
    leaves = case.live_leaves()
    loss = case.loss(leaves, backend).loss
    upstream = case.cotangent(loss)
    inputs = list(leaves.values())
    first = torch.autograd.grad(loss, inputs, upstream, retain_graph=True)
    other = torch.autograd.grad(loss, inputs, upstream.flip(0), retain_graph=True)
    again = torch.autograd.grad(loss, inputs, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# What must not underflow on its way, and what must not overflow: each chunk's logits gradient is
# float16 before the product with the head.


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("upstream", [2.0**-18, 2.0**18])
def test_float16_under_a_small_or_large_upstream(backend, upstream, rng, device) -> None:
    """Not by the rule: eager in float16 loses the same numbers."""
    rows = 7
    options = {"dtype": torch.float16, "vocab": 1024, "reduction": "none", "ids": 3}
    case = make_case(rng, device, path="linear", **options)
    # The head is such that the gradient itself is about 1, whatever its logits' gradient is.
    size = 2.0**10 if upstream < 1 else 2.0**-13
    hidden, weight = case.leaves.values()
    case = case.with_leaves(hidden=hidden / size, linear_weight=weight * size)
    row_upstream = 0.5 + torch.rand(rows, generator=rng).to(device)
    row_upstream[1::2] *= -1
    frozen = frozenset({"linear_weight"})
    case = case.changed(upstream=upstream, row_upstream=row_upstream, frozen=frozen)
    got = case.run(backend).grads["hidden"].double()
    truth = case.in_dtype(torch.float64).run("eager").grads["hidden"]
    error = (got - truth).abs().max() / truth.abs().max()
    assert error < 3e-3, "some roundings to float16, 2^-11 each"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", PATHS)
def test_nobody_asks_for_any_row(backend: str, path: str, rng, device) -> None:
    case = none_case(rng, device, path)
    result = case.changed(row_upstream=torch.zeros(7, device=device)).run(backend)
    assert all(not grad.any() and not grad.isnan().any() for grad in result.grads.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rows", [0, 5])
def test_no_rows_or_all_ignored(backend: str, path: str, rows: int, rng, device) -> None:
    case = make_case(rng, device, path=path, reduction="none", rows=rows, **EXTRAS)
    case = case.changed(target=torch.full_like(case.target, -100))
    result = case.run(backend)
    for term in result.terms:
        assert term.shape == (rows,) and not term.any()
    for name, grad in result.grads.items():
        assert grad.shape == case.leaves[name].shape and not grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", PATHS)
def test_counts_are_not_looked_at(backend: str, path: str, rng, device) -> None:
    case = none_case(rng, device, path)
    counted = case.with_options(num_items=1000, num_safety_items=0.5)
    assert torch.equal(counted.run(backend).terms.loss, case.run(backend).terms.loss)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("path", ["logits", "linear"])
def test_nan_in_a_row_stays_in_its_row(backend: str, path: str, rng, device) -> None:
    case = none_case(rng, device, path)
    case = case.with_options(safety_row_weight=None, ce_row_weight=None)
    name = next(iter(case.leaves))
    clean = case.run(backend)
    leaf = case.leaves[name].clone()
    leaf[1] = torch.nan
    spoilt = case.with_leaves(**{name: leaf}).run(backend)
    others = torch.arange(7, device=device) != 1
    for mine, wanted in zip(present(spoilt.terms), present(clean.terms), strict=True):
        assert mine[1].isnan() and torch.equal(mine[others], wanted[others])
    assert spoilt.grads[name][1].isnan().all()
    assert torch.equal(spoilt.grads[name][others], clean.grads[name][others])


@pytest.mark.parametrize("backend", OURS)
def test_inplace(backend: str, rng, device) -> None:
    case = none_case(rng, device, transform="cap")
    wanted = case.run(backend).grads["logits"]
    leaf = case.leaves["logits"].clone().requires_grad_()
    terms = case.with_options(inplace=True).loss({"logits": leaf * 1.0}, backend)
    terms.loss.backward(case.cotangent(terms.loss))
    assert torch.equal(leaf.grad, wanted)


def test_the_recomputation_sees_the_operands_of_autocast(rng, device) -> None:
    """Backward makes the logits again, outside autocast: of the rounded operands all the same."""
    case = none_case(rng, device, "linear+lora")
    got = case.run("torch", autocast=torch.bfloat16)
    assert_same(got, case.in_dtype(torch.bfloat16).run("torch"))
