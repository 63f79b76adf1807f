"""loss.md's edges: each has a defined answer, on every backend."""

from __future__ import annotations

import sys

import pytest
import torch
from cases import (
    PATHS,
    ROW_WEIGHTS,
    WEIGHTS,
    Result,
    assert_same,
    detached,
    make_case,
    present,
    with_masked_vocabulary,
)
from tolerance import assert_matches_truth

from str_kernels import SafetyPenalty, safety_cross_entropy

pytestmark = pytest.mark.gpu

BACKENDS = ["eager", "torch", "triton"]
OURS = ["torch", "triton"]
IGNORED = -100


def assert_nothing_lost(result: Result) -> None:
    """Loss 0 in every term, gradients of the right shape that are exactly 0."""
    assert [float(x) for x in present(result.terms)] == [0.0] * 4
    for name, grad in result.grads.items():
        assert grad is not None and not grad.any() and not grad.isnan().any(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("ids", [None, 3])
def test_no_rows(backend: str, path: str, ids: int | None, rng, device) -> None:
    case = make_case(rng, device, path=path, rows=0, ids=ids)
    result = case.run(backend)
    assert_nothing_lost(result)
    assert all(result.grads[name].shape == x.shape for name, x in case.leaves.items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", PATHS)
def test_every_row_ignored(backend: str, path: str, rng, device) -> None:
    case = make_case(rng, device, path=path)
    case = case.changed(target=torch.full_like(case.target, IGNORED))
    assert_nothing_lost(case.run(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", PATHS)
def test_rows_without_a_target_can_carry_the_penalty_alone(backend, path, rng, device) -> None:
    case = make_case(rng, device, path=path, safety_rows="weights")
    case = case.changed(target=torch.full_like(case.target, IGNORED))
    weights = case.options["safety_row_weight"].clone()
    weights[0] = 0.5
    case = case.with_options(safety_row_weight=weights)
    result = case.run(backend)
    assert float(result.terms.ce) == 0.0 and float(result.terms.penalty) > 0
    assert_matches_truth(case, result, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", PATHS)
def test_every_safety_weight_zero_is_plain_cross_entropy(backend, path, rng, device) -> None:
    case = make_case(rng, device, path=path)
    held = case.with_options(safety_row_weight=torch.zeros(7, device=device)).run(backend)
    without = case.changed(ids=None, ref=None)
    plain = without.run(backend)
    assert (float(held.terms.penalty), float(held.terms.max_drift)) == (0.0, 0.0)
    assert torch.equal(held.terms.loss, plain.terms.loss)
    assert_matches_truth(without, held, backend)  # S is computed apart and may round otherwise


@pytest.mark.parametrize("backend", BACKENDS)
def test_penalty_weight_zero_still_reports_the_penalty(backend: str, rng, device) -> None:
    case = make_case(rng, device)
    off = case.with_options(penalty=SafetyPenalty(weight=0)).run(backend)
    assert torch.equal(off.terms.loss, off.terms.ce)
    assert torch.equal(off.terms.penalty, case.run(backend).terms.penalty) and off.terms.penalty > 0
    assert_matches_truth(case.with_options(penalty=SafetyPenalty(weight=0)), off, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", PATHS)
def test_no_ids_is_the_same_as_no_set_and_as_torch(backend: str, path: str, rng, device) -> None:
    case = make_case(rng, device, path=path, ids=0)
    empty, without = case.run(backend), case.changed(ids=None, ref=None).run(backend)
    assert torch.equal(empty.terms.loss, without.terms.loss)
    for name, grad in empty.grads.items():
        assert torch.equal(grad, without.grads[name])
    wanted = torch.nn.functional.cross_entropy(case.raw_logits().double(), case.target)
    torch.testing.assert_close(empty.terms.loss.double(), wanted, rtol=3e-6, atol=0)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("transform", ["none", "scale+cap"])
def test_every_column_is_a_safety_id_and_each_is_a_target(
    backend, path, transform, rng, device
) -> None:
    case = make_case(rng, device, path=path, rows=9, vocab=9, ids=9, transform=transform)
    case = case.changed(target=torch.arange(9, device=device))
    assert_matches_truth(case, case.run(backend), backend)


# What may be left of the slope of a cap far out, 1 - tanh^2: tanh and z / softcap are quotients,
# and a GPU's may be off by 2^-22.
NEARLY_FLAT = 2.0**-20


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_masked_vocabulary(backend: str, softcap: float | None, rng, device) -> None:
    """-inf logits are legal; a whole first block of them too, where the running maximum is -inf."""
    case = make_case(rng, device, rows=5, vocab=9001, transform="cap" if softcap else "none")
    case, masked = with_masked_vocabulary(case, rng, 0.3)
    result = case.run(backend)
    flat = NEARLY_FLAT if softcap else 0.0
    assert bool((result.grads["logits"][masked].abs() <= flat).all())
    assert_matches_truth(case, result, backend)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("size", [1e2, 1e4, 6e4])
def test_a_cap_holds_against_huge_logits(backend: str, size: float, rng, device) -> None:
    """(e^2x - 1)/(e^2x + 1) would be NaN from x = 45 on."""
    case = make_case(rng, device, transform="cap")
    case = case.with_leaves(logits=case.leaves["logits"].sign() * size)
    result = case.run(backend)
    assert float(result.grads["logits"].abs().max()) <= NEARLY_FLAT
    assert_matches_truth(case, result, backend)


@pytest.mark.parametrize("backend", OURS)
def test_logits_far_from_zero(backend: str, rng, device) -> None:
    """exp must see z - max, and the cross-entropy small differences, not large sums."""
    case = make_case(rng, device)
    far = case.leaves["logits"].to(torch.bfloat16).float() + 2.0**14  # exact in float32
    case = case.changed(leaves={"logits": far}, ids=None, ref=None)
    near = case.with_leaves(logits=far - 2.0**14).run("eager")
    result = case.run(backend)
    torch.testing.assert_close(result.terms.loss, near.terms.loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [301, -1, -101, 2**40])
@pytest.mark.skipif(torch.cuda.is_available(), reason="labels are read on a CPU only, by design")
def test_a_label_outside_the_vocabulary_is_an_error(path, backend, bad, rng, device) -> None:
    case = make_case(rng, device, path=path, vocab=301)
    target = case.target.clone()
    target[4] = bad
    message = rf"^`target` must be in \[0, 301\) or -100 \(ignore_index\); got {bad} in row 4$"
    # chunks of three rows: the row's number is the caller's, not the chunk's
    chunks = {"chunk_bytes": 304 * 4 * 3} if case.linear else {}
    with pytest.raises(ValueError, match=message):
        case.changed(target=target).with_options(**chunks).run(backend)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("bad", [301, -1, 2**40])
def test_a_label_nobody_read_makes_its_own_row_nan(backend, bad, rng, device, monkeypatch) -> None:
    """What a GPU does, where labels are not read: no read outside the row, no other row touched."""
    for name, module in list(sys.modules.items()):
        if name.startswith("str_kernels") and hasattr(module, "check_values"):
            monkeypatch.setattr(module, "check_values", lambda *_: None)
    case = make_case(rng, device, vocab=301, ids=3).with_options(reduction="sum")
    good = case.run(backend)
    target = case.target.clone()
    target[4] = bad
    result = case.changed(target=target).run(backend)
    grad = result.grads["logits"]
    assert result.terms.loss.isnan() and result.terms.ce.isnan() and grad[4].isnan().all()
    others = torch.arange(7, device=device) != 4
    assert torch.equal(grad[others], good.grads["logits"][others])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("path", PATHS)
def test_a_row_that_does_not_take_part_leaks_nothing(backend, poison, path, rng, device) -> None:
    """Row 3 is ignored, row 4 has both weights 0: whatever they hold, nothing else changes."""
    case = make_case(rng, device, path=path, vocab=301, **ROW_WEIGHTS)
    target, options = case.target.clone(), dict(case.options)
    target[3] = IGNORED
    target[4] = 7
    for name in ("safety_row_weight", "ce_row_weight"):
        options[name] = options[name].clone()
        options[name][[3, 4]] = 0.0
        options[name][0] = 1.0
    case = case.changed(target=target, options=options)
    clean = case.run(backend)
    name = "hidden" if case.linear else "logits"
    leaf, ref = case.leaves[name].clone(), case.ref.clone()
    leaf[[3, 4]] = ref[[3, 4]] = poison
    spoilt = case.with_leaves(**{name: leaf}).changed(ref=ref).run(backend)
    assert_same(spoilt, clean)
    assert not spoilt.grads[name][[3, 4]].any()


@pytest.mark.parametrize("backend", OURS)
def test_the_weight_of_an_ignored_row_is_not_looked_at(backend: str, rng, device) -> None:
    case = make_case(rng, device, ce_rows="weights")
    case.target[3] = IGNORED
    clean = case.run(backend)
    case.options["ce_row_weight"][3] = torch.nan
    assert_same(case.run(backend), clean)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("path", PATHS)
def test_nan_in_a_row_that_counts_stays_in_its_row(backend: str, path: str, rng, device) -> None:
    case = make_case(rng, device, path=path)
    name = "hidden" if case.linear else "logits"
    clean = case.run(backend).grads[name]
    leaf = case.leaves[name].clone()
    leaf[1] = torch.nan
    result = case.with_leaves(**{name: leaf}).run(backend)
    grad = result.grads[name]
    assert all(x.isnan() for x in (result.terms.loss, result.terms.ce, result.terms.penalty))
    assert grad[1].isnan().all()
    others = torch.arange(len(leaf), device=device) != 1
    assert torch.equal(grad[others], clean[others])


@pytest.mark.parametrize("backend", OURS)
def test_max_drift_reports_nan(backend: str, rng, device) -> None:
    """A maximum that skips NaN would report a healthy drift of a broken row."""
    case = make_case(rng, device)
    ref = case.ref.clone()
    ref[0, 2] = torch.nan
    assert case.changed(ref=ref).run(backend).terms.max_drift.isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", PATHS)
def test_the_callers_tensors_are_not_touched(backend: str, path: str, rng, device) -> None:
    case = make_case(rng, device, path=path, counts="tensors", penalty_weight="tensor", **WEIGHTS)
    leaves = {name: x.clone().requires_grad_() for name, x in case.leaves.items()}
    penalty = case.options["penalty"]
    given = [*leaves.values(), case.target, case.ids, case.ref, penalty.weight, penalty.id_weights]
    given += [x for x in case.options.values() if isinstance(x, torch.Tensor)]
    before = [(x.detach().clone(), x._version) for x in given]
    terms = case.loss(leaves, backend)
    assert all(torch.equal(x, old) for x, (old, _) in zip(given, before, strict=True))
    terms.loss.backward()
    for x, (old, version) in zip(given, before, strict=True):
        assert torch.equal(x, old) and x._version == version


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("ids", [None, 5, 301])
@pytest.mark.parametrize("transform", ["none", "scale+cap"])
def test_inplace(backend: str, ids: int | None, transform: str, rng, device) -> None:
    """Forward leaves the logits, backward turns them into their gradient, a second one raises."""
    case = make_case(rng, device, ids=ids, vocab=301, transform=transform)
    leaf = case.leaves["logits"].clone().requires_grad_()
    logits = leaf * 1.0
    terms = case.with_options(inplace=True).loss({"logits": logits}, backend)
    assert torch.equal(logits, leaf)
    terms.loss.backward(torch.full_like(terms.loss, case.upstream), retain_graph=True)
    assert torch.equal(logits, leaf.grad)  # the gradient lies where the logits were
    assert_matches_truth(case, Result(detached(terms), {"logits": leaf.grad}), backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        terms.loss.backward()


@pytest.mark.parametrize("backend", OURS)
def test_inplace_gradient_is_not_part_of_the_graph(backend: str, rng, device) -> None:
    """Were it the logits themselves, `retain_grad` would tie a knot that keeps the graph alive."""
    case = make_case(rng, device).with_options(inplace=True)
    logits = case.leaves["logits"].clone().requires_grad_() * 1.0
    (grad,) = torch.autograd.grad(case.loss({"logits": logits}, backend).loss, logits)
    assert not grad.requires_grad


def strided(x: torch.Tensor, how: str) -> torch.Tensor:
    """Return the same values laid out otherwise."""
    if how == "transposed":
        return x.t().contiguous().t()
    if how == "every other":  # rows apart, and elements apart within a row
        wide = x.new_full([2 * size for size in x.shape], 77)
        view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
    elif how == "inside a wider one":
        wide = x.new_full((x.shape[0] + 1, *(size + 5 for size in x.shape[1:])), 77)
        view = wide[tuple(slice(1, None) if i == 0 else slice(0, -5) for i in range(x.dim()))]
    else:
        raise ValueError(how)
    return view.copy_(x)


HOW = ["transposed", "every other", "inside a wider one"]
LAYOUTS = [
    (what, path, how)
    for what in ("leaves", "ref", "vectors", "logits in place")
    for path in ("logits", "linear+bias")
    for how in HOW
    if (what, how) != ("vectors", "transposed") and (what, path) != ("logits in place", PATHS[2])
]


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize(("what", "path", "how"), LAYOUTS)
def test_strides(backend: str, what: str, path: str, how: str, rng, device) -> None:
    """The values count, not where they lie; rows and vocabulary differ, so that no mix-up fits."""
    case = make_case(rng, device, path=path, vocab=301, dim=8, **WEIGHTS)
    if what == "leaves":
        leaves = {n: strided(x, how) if x.dim() == 2 else x for n, x in case.leaves.items()}
        other = case.with_leaves(**leaves)
    elif what == "ref":
        other = case.changed(ref=strided(case.ref, how))
    elif what == "logits in place":
        logits = strided(case.leaves["logits"], how).requires_grad_() * 1.0
        assert logits.stride() != case.leaves["logits"].stride() or how != "transposed"
        inplace = case.with_options(inplace=True)
        terms = inplace.loss({"logits": logits}, backend)
        (grad,) = torch.autograd.grad(terms.loss * case.upstream, logits)
        assert grad.data_ptr() == logits.data_ptr()
        assert_matches_truth(case, Result(detached(terms), {"logits": grad.detach()}), backend)
        return
    else:
        options = {
            name: strided(x, how) if isinstance(x, torch.Tensor) else x
            for name, x in case.options.items()
        }
        a = strided(case.options["penalty"].id_weights, how)
        options["penalty"] = SafetyPenalty(weight=0.3, id_weights=a)
        target, ids = strided(case.target, how), strided(case.ids, how)
        other = case.changed(target=target, ids=ids, options=options)
    assert_matches_truth(case, other.run(backend), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_word_and_one_row(backend: str, device) -> None:
    logits = torch.tensor([[3.0]], device=device, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    ref = torch.full((1, 1), 1.0, device=device)
    terms = safety_cross_entropy(logits, zero, zero, ref, backend=backend)
    terms.loss.backward()
    assert (float(terms.ce), float(terms.penalty), float(terms.max_drift)) == (0.0, 4.0, 2.0)
    torch.testing.assert_close(logits.grad, torch.full((1, 1), 0.4), check_device=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_weights_that_sum_to_0(backend: str, rng, device) -> None:
    """Each of them 0, or a positive and a negative one, as an advantage in RL may be."""
    case = make_case(rng, device, **ROW_WEIGHTS)
    for weights in ([0.0] * 7, [1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0]):
        row_weight = torch.tensor(weights, device=device)
        off = case.with_options(ce_row_weight=row_weight, safety_row_weight=row_weight * 0)
        result = off.run(backend)
        assert all(x.isfinite() for x in result.terms[:4])
        assert_matches_truth(off, result, backend)
    assert not result.grads["logits"][2:].any() and result.grads["logits"][:2].all()


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("path", ["logits", "linear+lora"])
def test_expanded_inputs(backend: str, path: str, rng, device) -> None:
    """One row for all, of stride 0: as what is read, and as a leaf whose gradient is not."""
    case = make_case(rng, device, path=path, **WEIGHTS)
    options = dict(case.options)
    for name in ("safety_row_weight", "ce_row_weight"):
        options[name] = torch.full((), 0.7, device=device).expand(7)
    leaves = dict(case.leaves)
    first = next(iter(leaves))
    leaves[first] = leaves[first][:1].expand(7, -1)
    target, ref = case.target[:1].expand(7), case.ref[:1].expand(7, 5)
    expanded = case.changed(leaves=leaves, target=target, ref=ref, options=options)
    dense = expanded.with_leaves(**{name: x.clone() for name, x in leaves.items()})
    dense = dense.changed(target=target.clone(), ref=ref.clone())
    # Each by the rule, and not one by the other: a stride of 0 is a multiple of 16, one of 301 is
    # not, and Triton compiles a kernel for each, which sum a row in two orders.
    for given in (expanded, dense):
        assert_matches_truth(dense, given.run(backend), backend)
