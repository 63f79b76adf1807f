"""The ops as autograd sees them: derivatives, cotangents, needs, memory, accumulation."""

from __future__ import annotations

from collections.abc import Callable

import cases
import pytest
import torch
from cases import EXTRAS, OF_ROWS, ROW_WEIGHTS, WEIGHTS, Case, Result, make_case, present
from tolerance import OutOfTolerance, assert_matches_truth

from str_kernels import SafetyLoss, SafetyPenalty, safety_linear_cross_entropy
from str_kernels.op import autograd, chunks

pytestmark = pytest.mark.gpu

OURS = ["torch", "triton"]
PATHS = ["logits", "linear+bias"]


def small(rng, device, path: str, **options) -> Case:
    sizes = {"rows": 5, "vocab": 11, "ids": 3, "dim": 4}
    return make_case(rng, device, path=path, **sizes, **WEIGHTS, **options)


@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("transform", ["none", "scale+cap"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck(backend, path, transform, reduction, rng, device) -> None:
    case = small(rng, device, path, transform=transform, dtype=torch.float64, reduction=reduction)
    assert torch.autograd.gradcheck(*case.as_function(backend))


@pytest.mark.parametrize("path", cases.PATHS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_eager_has_a_second_derivative(path: str, reduction: str, rng, device) -> None:
    sizes = {"rows": 3, "vocab": 7, "ids": 2, "dim": 2, "rank": 1, "dtype": torch.float64}
    options = {"transform": "cap", "reduction": reduction, **sizes, **WEIGHTS}
    case = make_case(rng, device, path=path, **options)
    assert torch.autograd.gradgradcheck(*case.as_function("eager"))


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("path", cases.PATHS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("beside", [False, True])
def test_ours_refuses_a_second_derivative(backend, path, reduction, beside, rng, device) -> None:
    """Of a gradient penalty beside another loss, too: its part must not be left out in silence."""
    loss, leaves = small(rng, device, path, reduction=reduction).as_function(backend)
    with pytest.raises(RuntimeError):
        first = torch.autograd.grad(loss(*leaves).sum(), leaves, create_graph=True)
        (first[0].square().sum() + beside * sum(x.sum() for x in leaves)).backward()


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("path", PATHS)
def test_backward_twice_gives_the_same_twice(backend: str, path: str, rng, device) -> None:
    loss_of, leaves = small(rng, device, path).as_function(backend)
    loss = loss_of(*leaves)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("upstream", [0.0, 1.0, -3.0, 1e-6, 65536.0])
def test_upstream_gradient(backend: str, path: str, upstream: float, rng, device) -> None:
    case = small(rng, device, path).changed(upstream=upstream)
    assert_matches_truth(case, case.run(backend), backend)


@pytest.mark.parametrize("backend", ["eager", *OURS])
@pytest.mark.parametrize("path", cases.PATHS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_the_loss_has_a_gradient(backend, path, reduction, rng, device) -> None:
    case = small(rng, device, path, reduction=reduction, **EXTRAS)
    terms = case.loss(case.live_leaves(), backend)
    assert [x.requires_grad for x in terms] == [True] + [False] * 5


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("path", PATHS)
def test_without_grad_the_row_step_is_not_asked_for_one(
    backend: str, path: str, rng, device, monkeypatch
) -> None:
    asked = []
    original = autograd.row_step_of

    def spying(name: str) -> Callable:
        def row_step(*args, **kwargs):
            asked.append(kwargs.get("grad") is not None)
            return original(name)(*args, **kwargs)

        return row_step

    for module in (autograd, chunks):
        monkeypatch.setattr(module, "row_step_of", spying)
    case = small(rng, device, path)
    wanted = case.run("eager").terms.loss
    with torch.no_grad():
        terms = case.loss(case.live_leaves(), backend)
    frozen = case.loss(case.leaves, backend)
    assert asked and not any(asked)
    assert not terms.loss.requires_grad and not frozen.loss.requires_grad
    torch.testing.assert_close(terms.loss, wanted, rtol=1e-6, atol=0)
    assert torch.equal(terms.loss, frozen.loss)
    case.run(backend)
    assert any(asked), "the spy sees nothing"


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize(
    ("path", "reduction", "frozen"),
    [
        ("linear+bias", "mean", ["linear_weight", "linear_bias"]),
        ("linear+bias", "mean", ["hidden"]),
        ("linear+bias", "mean", ["hidden", "linear_weight"]),
        ("linear+bias", "mean", ["linear_bias"]),
        ("linear+bias", "mean", ["hidden", "linear_bias"]),
        ("linear+lora", "none", ["linear_weight"]),
        ("linear+lora", "none", ["hidden"]),
        ("linear+lora", "none", ["low_rank_t"]),
        ("linear+lora", "none", ["low_rank_b", "linear_weight"]),
    ],
)
def test_frozen_leaves_get_nothing_and_the_others_all(
    backend, path, reduction, frozen, rng, device
) -> None:
    case = small(rng, device, path, reduction=reduction).changed(frozen=frozenset(frozen))
    result = case.run(backend)
    assert {name for name, grad in result.grads.items() if grad is None} == set(frozen)
    assert_matches_truth(case, result, backend)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("path", ["logits", "linear", "linear+bias", "linear+lora"])
def test_micro_batches_add_up_to_the_batch(backend: str, path: str, rng, device) -> None:
    case = make_case(rng, device, path=path, rows=11, counts="numbers", **ROW_WEIGHTS)
    leaves = case.live_leaves()
    parts = []
    for part in (slice(0, 4), slice(4, 8), slice(8, 11)):  # the last one is smaller
        micro = case.rows(part)
        of_part = {name: x[part] if name in OF_ROWS else x for name, x in leaves.items()}
        terms = micro.loss(of_part, backend)
        (terms.loss * case.upstream).backward()
        parts.append(torch.stack(present(terms)).detach())
    *sums, _ = torch.stack(parts).sum(0)
    total = SafetyLoss(*sums, torch.stack(parts)[:, 3].amax())
    grads = {name: leaf.grad for name, leaf in leaves.items()}
    assert_matches_truth(case, Result(total, grads), backend)
    # not passing the counts is what goes wrong when training with accumulation
    lone = case.rows(slice(0, 4)).with_options(num_items=None, num_safety_items=None)
    assert lone.run(backend).terms.loss != case.rows(slice(0, 4)).run(backend).terms.loss


@pytest.mark.parametrize("transform", ["none", "cap"])
def test_the_chunk_size_does_not_matter(transform: str, rng, device) -> None:
    """In float64, so that nothing but the order of sums is left: relative 1e-12."""
    sizes = {"dtype": torch.float64, "rows": 23, "vocab": 101}
    case = make_case(rng, device, path="linear+bias", transform=transform, **sizes)
    whole = case.run("torch")
    row_bytes = 112 * 8  # 101 columns padded to 112
    rows = (1, 5, 22, 23)
    for chunk_bytes in (2 * row_bytes - 1, 1 << 30, *(n * row_bytes for n in rows)):
        other = case.with_options(chunk_bytes=chunk_bytes).run("torch")
        for mine, wanted in zip(present(other.terms), present(whole.terms), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=0)
        for name, grad in whole.grads.items():
            torch.testing.assert_close(other.grads[name], grad, rtol=1e-11, atol=1e-14)


def test_chunks_are_as_many_as_the_budget_says(device) -> None:
    hidden = torch.zeros(9, 2, device=device)
    rows = [chunks.rows_per_chunk(hidden, 20, b) for b in (128, 255, 256, 1280)]
    # 20 columns are padded to 32, of 4 bytes; and there are no more than nine rows
    assert rows == [1, 1, 2, 9]


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return how much more memory than before was in use at the worst moment of `run`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("frozen_head", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])  # "none" makes the logits twice
def test_memory_of_the_linear_path(backend, frozen_head, reduction, rng, device) -> None:
    """No (N, V) tensor, and no (V, D) one for a frozen head; eager, which has both, is seen to."""
    rows, vocab, dim, chunk = 32, 4096, 16, 4
    frozen = frozenset({"linear_weight"} if frozen_head else ())
    sizes = {"rows": rows, "vocab": vocab, "dim": dim}
    case = make_case(rng, device, path="linear", reduction=reduction, **sizes)
    case = case.changed(frozen=frozen).with_options(chunk_bytes=chunk * vocab * 4)
    full, head = rows * vocab * 4, vocab * dim * 4
    of_head = 0 if frozen_head else 2 * head  # the sum, and its product with the upstream gradient
    case.run(backend)  # what is made once
    assert peak_bytes(lambda: case.run("eager"), device) > full + head * (not frozen_head)
    # the chunk, the torch row step's float32 scratch of the same size, and small things
    allowed = 2 * chunk * vocab * 4 + of_head + (48 << 10)
    assert allowed < full + of_head
    peak = peak_bytes(lambda: case.run(backend), device)
    assert peak < allowed, f"{peak} bytes; {full} for (N, V), {head} for (V, D)"
    if not frozen_head:
        assert peak > of_head, "the measurement misses the head's gradient"


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("inplace", [False, True])
def test_memory_of_the_logits_path(backend: str, inplace: bool, rng, device) -> None:
    """Beyond the logits only their gradient, and with `inplace` not even that."""
    rows, vocab = 64, 16384
    scratch = 2 << 20 if device.type == "cpu" and backend == "torch" else 0
    if device.type == "cuda" and backend == "torch":
        pytest.skip("on a device the torch row step's scratch is as large as these logits")
    full = rows * vocab * 4  # 4 MB
    case = make_case(rng, device, rows=rows, vocab=vocab).with_options(inplace=inplace)
    case = case.rows(slice(0, 2)) if backend == "triton" and device.type == "cpu" else case
    full = len(case.target) * vocab * 4
    logits = case.leaves["logits"].clone().requires_grad_() * 1.0

    def run() -> None:
        loss = case.loss({"logits": logits}, backend).loss
        torch.autograd.grad(loss, logits)

    run()
    logits = case.leaves["logits"].clone().requires_grad_() * 1.0
    peak = peak_bytes(run, device)
    allowed = (0 if inplace else full) + scratch + (96 << 10)
    assert peak < allowed, f"{peak} bytes; {full} for (N, V)"
    assert inplace or peak >= full


def naive_half_gradient(case: Case) -> torch.Tensor:
    """Fold 1/N into float16 logit gradients before anything is scaled up: what must not be done."""
    z = case.raw_logits().float()
    p = z.softmax(1)
    p[torch.arange(len(p)), case.target] -= 1
    small = (p / 2048).half()
    return (small @ case.leaves["linear_weight"]).float() * case.upstream


@pytest.mark.slow
def test_small_float16_gradients_do_not_underflow(rng, device) -> None:
    """N = 2048, V = 32000, upstream 65536: 91 % of p / N is below float16's smallest number."""
    n, vocab, dim = 2048, 32000, 16
    weight = (torch.randn(vocab, dim, generator=rng) / dim**0.5).to(device, torch.float16)
    hidden = torch.randn(n, dim, generator=rng).to(device, torch.float16)
    target = torch.randint(vocab, (n,), generator=rng).to(device)
    leaf = hidden.clone().requires_grad_()
    terms = safety_linear_cross_entropy(leaf, weight, target)
    (terms.loss * 65536.0).backward()
    part = slice(0, 128)  # the truth of these rows is enough
    leaves = {"hidden": hidden[part], "linear_weight": weight}
    options = {"num_items": n, "reduction": "mean", "penalty": SafetyPenalty()}
    options.update(ignore_index=-100, logit_scale=1.0, softcap=None)
    case = Case(leaves, target[part], None, None, options, 65536.0, frozenset({"linear_weight"}))
    truth = case.in_dtype(torch.float64).run("eager").grads["hidden"]
    error = (leaf.grad[part].double() - truth).abs().max() / truth.abs().max()
    naive = (naive_half_gradient(case).double() - truth).abs().max() / truth.abs().max()
    assert error < 2e-3, "two roundings to float16, 2^-11 each, and their sum over V"
    assert naive > 5 * error, "the case does not tell the two ways apart"


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_upstream_scale_is_not_rounded_to_the_leafs_dtype(backend, dtype, rng, device) -> None:
    """65536 itself is inf in float16, and a third is off by 2^-9 in bfloat16."""
    case = make_case(rng, device, path="linear", dtype=dtype, reduction="sum", rows=3)
    case = case.with_leaves(linear_weight=case.leaves["linear_weight"] / 64)
    for upstream in (65536.0 * 1.5, 1 / 3):
        scaled = case.changed(upstream=upstream).run(backend).grads["hidden"].double()
        plain = case.changed(upstream=1.0).run(backend).grads["hidden"].double()
        error = (scaled - upstream * plain).abs()
        unit = torch.finfo(dtype).eps / 2
        if not bool((error <= 1.01 * unit * upstream * plain.abs() + 1e-7).all()):
            raise OutOfTolerance(f"more than one rounding at upstream {upstream}")
