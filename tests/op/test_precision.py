"""What is lost to rounding, where a wrong order of operations would lose it."""

from __future__ import annotations

import pytest
import torch
from cases import Case, assert_same, make_case, present
from tolerance import assert_matches_truth

from str_kernels import SafetyPenalty, project, safety_cross_entropy, safety_linear_cross_entropy

pytestmark = pytest.mark.gpu

OURS = ["torch", "triton"]
LOW = [torch.bfloat16, torch.float16]


def sure_case(rng, device, *, dtype, path: str, margin: float, in_set: bool, far: float) -> Case:
    """Every row is sure of its target: p_y is near 1, the largest logit `far` from zero.

    The head's rows have a common direction that gives every logit `far`, and the target's row adds
    `margin`; with `in_set` each target is a safety id too.
    """
    rows, vocab, dim = 6, 259, 24
    case = make_case(rng, device, path="linear", dtype=torch.float64, rows=rows, vocab=vocab)
    target = torch.randperm(vocab, generator=rng)[:rows].to(device)
    hidden = torch.zeros(rows, dim, dtype=torch.float64, device=device)
    hidden[torch.arange(rows), torch.arange(rows)] = 1.0
    hidden[:, -1] = 1.0
    weight = torch.randn(vocab, dim, generator=rng, dtype=torch.float64).to(device) / 3
    weight[:, -1] = far
    weight[target, torch.arange(rows)] += margin
    leaves = {"hidden": hidden, "linear_weight": weight}
    ids = target[:5] if in_set else (target[:5] + 1) % vocab
    ids = ids if in_set else torch.tensor([i for i in range(vocab) if i not in target.tolist()])[:5]
    ids = ids.to(device)
    case = case.changed(leaves=leaves, target=target, ids=ids, ref=torch.zeros(5, device=device))
    # A penalty would hide the cross-entropy's small gradient on S.
    case = case.with_options(penalty=SafetyPenalty(weight=0.0)).in_dtype(dtype)
    if path == "logits":
        case = case.from_logits(case.raw_logits())
    return case


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("path", ["logits", "linear"])
@pytest.mark.parametrize("in_set", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("margin", [8.0, 14.0])
def test_a_sure_row_keeps_its_small_gradient(
    backend, path, in_set, dtype, margin, rng, device
) -> None:
    """p_y - 1 is about -0.1 and -2e-4 here. Three ways to lose it:

    reading a rounded softmax back and subtracting 1; taking z_y - lse with lse (about 20) as one
    float32 number; taking z_y and lse from two differently rounded logits.
    """
    far = 16.3  # where bfloat16 has steps of 0.125 and float32 of 2e-6
    case = sure_case(rng, device, dtype=dtype, path=path, margin=margin, in_set=in_set, far=far)
    assert_matches_truth(case, case.run(backend), backend)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("backend", [*OURS, "eager"])
@pytest.mark.parametrize("rows", [1, 5, 1030])
def test_the_penalty_is_exactly_zero_at_step_0(dtype, backend, rows, rng, device) -> None:
    """Blocks of 1024 rows in project, chunks of 3 and 7 rows, rows that divide none of them."""
    if backend == "triton" and device.type == "cpu" and rows > 5:
        rows = 11  # a program per row is slow in the interpreter; z_S comes from project anyway
    vocab, dim = 97, 48
    hidden = torch.randn(rows, dim, generator=rng).to(device, dtype)
    weight = torch.randn(vocab, dim, generator=rng).to(device, dtype)
    bias = torch.randn(vocab, generator=rng).to(device, dtype)
    target = torch.randint(vocab, (rows,), generator=rng).to(device)
    ids = torch.randperm(vocab, generator=rng)[:64].to(device)
    for softcap, scale in ((None, 1.0), (20.0, 0.7)):
        ref = project(hidden, weight, ids, bias, softcap=softcap, logit_scale=scale)
        for chunk_bytes in (None, 3 * 112 * dtype.itemsize, 7 * 112 * dtype.itemsize):
            options = {"softcap": softcap, "logit_scale": scale, "chunk_bytes": chunk_bytes}
            leaf = hidden.clone().requires_grad_()
            options |= {"linear_bias": bias, "backend": backend}
            terms = safety_linear_cross_entropy(leaf, weight, target, ids, ref, **options)
            assert float(terms.penalty) == 0.0 and float(terms.max_drift) == 0.0
            assert torch.equal(terms.loss, terms.ce)
    moved = hidden.clone()
    moved[0, 0] += 0.25
    assert safety_linear_cross_entropy(moved, weight, target, ids, ref, **options).penalty > 0


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_the_penalty_is_exactly_zero_at_step_0_from_logits(backend, dtype, rng, device) -> None:
    case = make_case(rng, device, dtype=dtype)
    case = case.changed(ref=case.leaves["logits"][:, case.ids])
    terms = case.run(backend).terms
    assert float(terms.penalty) == 0.0 and float(terms.max_drift) == 0.0


@pytest.mark.parametrize("dtype", LOW)
def test_the_drift_is_seen_below_the_steps_of_the_dtype(dtype, rng, device) -> None:
    """A shift of 0.01 logits at 40, where bfloat16 has steps of 0.25, float16 of 0.03."""
    hidden = torch.full((4, 64), 0.625, device=device, dtype=dtype)
    weight = torch.ones(9, 64, device=device, dtype=dtype)
    ids, target = torch.arange(3, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    ref = project(hidden, weight, ids) + 0.01
    assert float(ref[0, 0]) == pytest.approx(40.01)
    terms = safety_linear_cross_entropy(hidden, weight, target, ids, ref)
    assert float(terms.penalty) == pytest.approx(1e-4, rel=1e-3)
    assert float(terms.max_drift) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("path", ["logits", "linear"])
def test_terms_are_float32_for_narrow_inputs(dtype, path, rng, device) -> None:
    """A bfloat16 loss of 11 nats has steps of 0.06."""
    terms = make_case(rng, device, path=path, dtype=dtype, reduction="none").run("torch").terms
    assert {x.dtype for x in present(terms)} == {torch.float32}
    # in one of the rows at least: a single loss may happen to be a number of the narrow dtype
    assert (terms.loss != terms.loss.to(dtype)).any()


@pytest.mark.parametrize("dtype", LOW)
def test_the_heads_gradient_is_summed_in_float32(dtype, rng, device) -> None:
    """256 chunks of one row: a bfloat16 sum would stop growing at 256 times a term's size."""
    rows, vocab, dim = 256, 32, 8
    hidden = torch.ones(rows, dim, device=device, dtype=dtype)
    weight = torch.zeros(vocab, dim, device=device, dtype=dtype, requires_grad=True)
    target = torch.zeros(rows, dtype=torch.int64, device=device)
    options = {"reduction": "sum", "chunk_bytes": vocab * dtype.itemsize, "backend": "torch"}
    safety_linear_cross_entropy(hidden, weight, target, **options).loss.backward()
    assert weight.grad.dtype == dtype
    # each row adds 1/32 to a column that is not the target: 8 in all, exact in every dtype
    assert torch.equal(weight.grad[1:], torch.full_like(weight.grad[1:], 8.0))
    assert torch.equal(weight.grad[0], torch.full_like(weight.grad[0], 8.0 - 256.0))


@pytest.mark.parametrize("count", [8191, torch.tensor(8191)])
@pytest.mark.parametrize("path", ["logits", "linear"])
def test_counts_are_not_rounded_to_the_inputs_dtype(count, path, rng, device) -> None:
    """8191 is 8192 in bfloat16."""
    case = make_case(rng, device, path=path, dtype=torch.bfloat16, counts="numbers")
    mean = case.with_options(num_items=count, num_safety_items=count).run("torch")
    total = case.with_options(reduction="sum").run("torch")
    for mine, whole in zip(mean.terms[:3], total.terms[:3], strict=True):
        assert float(mine) == pytest.approx(float(whole) / 8191, rel=1e-6)


def test_a_loss_of_many_rows_is_summed_without_drifting(rng, device) -> None:
    """65,536 equal rows: a float32 sum that adds one row after the other would be off by 1e-4."""
    logits = torch.zeros(65536, 3, device=device)
    logits[:, 0] = 0.1
    target = torch.full((65536,), 2, device=device)
    mean = safety_cross_entropy(logits, target, backend="torch").loss
    one = safety_cross_entropy(logits[:1].double(), target[:1], backend="eager").loss
    assert float(mean) == pytest.approx(float(one), rel=3e-7)


# autocast: the public function rounds the operands as the head's own product would be, and nothing
# else; the op computes in their dtype.


@pytest.mark.parametrize("backend", [*OURS, "eager"])
@pytest.mark.parametrize("dtype", LOW)
def test_autocast_rounds_the_operands_and_returns_gradients_as_the_leaves(
    backend, dtype, rng, device
) -> None:
    case = make_case(rng, device, path="linear+bias", counts="numbers")
    got = case.run(backend, autocast=dtype)
    assert {grad.dtype for grad in got.grads.values()} == {torch.float32}
    assert_same(got, case.in_dtype(dtype).run(backend))
    assert got.terms.ce != case.run(backend).terms.ce, "autocast did nothing"


@pytest.mark.parametrize("backend", [*OURS, "eager"])
def test_autocast_leaves_the_counts_and_the_logits_alone(backend, rng, device) -> None:
    """8191 would become 8192, and float32 logits have been paid for."""
    for path, dtype in (("logits", torch.float32), ("linear", torch.bfloat16)):
        case = make_case(rng, device, path=path, dtype=dtype)
        case = case.with_options(num_items=8191, num_safety_items=torch.tensor(8191))
        cast = case.run(backend, autocast=torch.bfloat16)
        assert {x.dtype for x in present(cast.terms)} == {torch.float32}
        assert_same(cast, case.run(backend))


@pytest.mark.parametrize("backend", [*OURS, "eager"])
def test_step_0_is_exactly_zero_under_autocast(backend, rng, device) -> None:
    case = make_case(rng, device, path="linear+bias")
    hidden, weight, bias = case.leaves.values()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ref = project(hidden, weight, case.ids, bias)
    terms = case.changed(ref=ref).run(backend, autocast=torch.bfloat16).terms
    assert ref.dtype == torch.float32
    assert float(terms.penalty) == 0.0 and float(terms.max_drift) == 0.0
    outside = case.changed(ref=project(hidden, weight, case.ids, bias))
    # a reference made elsewhere is seen
    assert outside.run(backend, autocast=torch.bfloat16).terms.penalty > 0


def test_autocast_leaves_float64_alone(rng, device) -> None:
    case = make_case(rng, device, path="linear", dtype=torch.float64)
    got = case.run("torch", autocast=torch.bfloat16)
    assert torch.equal(got.terms.loss, case.run("torch").terms.loss)


def test_project_has_gradients_and_no_autocast_surprise(rng, device) -> None:
    case = make_case(rng, device, path="linear+bias", transform="scale+cap", dtype=torch.float64)
    options = {name: case.options[name] for name in ("logit_scale", "softcap")}

    def run(hidden, weight, bias):
        return project(hidden, weight, case.ids, bias, **options)

    leaves = tuple(case.live_leaves().values())
    assert torch.autograd.gradcheck(run, leaves)
    assert run(*leaves).shape == (7, 5)
    assert project(leaves[0][:0], leaves[1], case.ids).shape == (0, 5)


@pytest.mark.parametrize("backend", OURS)
def test_grad_scaler(backend, rng, device) -> None:
    """Scaling by 2^16 and back changes nothing in float32, where no bit is lost by it."""
    case = make_case(rng, device, path="linear+bias")
    wanted = case.changed(upstream=1.0).run(backend)
    leaves = {name: torch.nn.Parameter(x.clone()) for name, x in case.leaves.items()}
    scaler = torch.amp.GradScaler(device.type, init_scale=65536.0)
    optimizer = torch.optim.SGD(leaves.values(), lr=0.0)
    scaler.scale(case.loss(leaves, backend).loss).backward()
    scaler.unscale_(optimizer)
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, wanted.grads[name])
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 65536.0  # no inf was found


@pytest.mark.parametrize("counts", [(1e6, 1.0), (1.0, 1e6), (0.0, 1.0), (1e6, 0.0)])
def test_float16_holds_when_the_two_counts_are_far_apart(counts, rng, device) -> None:
    """A million tokens in the step and one anchor row: neither sum may push the other to inf."""
    case = make_case(rng, device, path="linear", dtype=torch.float16, ids=3)
    case = case.with_options(num_items=counts[0], num_safety_items=counts[1])
    result = case.run("torch")
    assert all(grad.isfinite().all() for grad in result.grads.values())
    hidden = case.changed(frozen=frozenset({"linear_weight"}))
    assert_matches_truth(hidden, hidden.run("torch"), "torch")


@pytest.mark.parametrize("weight", [1.0, 10.0, 100.0])
def test_few_anchor_rows_do_not_drown_the_cross_entropy_in_float16(weight, rng, device) -> None:
    """One anchor among 2,048 rows: its penalty is divided by 1, their cross-entropy by 2,047."""
    sizes = {"rows": 2048, "vocab": 2000, "dim": 32, "ids": 5}
    case = make_case(rng, device, path="linear", dtype=torch.float16, **sizes)
    on = torch.zeros(2048, device=device)
    on[7] = 1.0
    case.target[7] = -100
    penalty = SafetyPenalty(weight)
    case = case.with_options(safety_row_weight=on, penalty=penalty).changed(upstream=1.0)
    truth = case.in_dtype(torch.float64).run("eager").grads["hidden"]
    grad = case.run("torch").grads["hidden"].double()
    for rows in (on == 0, on == 1):
        error = (grad - truth)[rows].norm() / truth[rows].norm()
        assert error < 2e-3, f"{float(error):.1e}"
