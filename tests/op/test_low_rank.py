"""A head with a LoRA on it: logits = hidden W^T + bias + t B^T, W frozen or not, never copied."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import ROW_WEIGHTS, Case, assert_same, make_case
from test_autograd import peak_bytes
from tolerance import assert_matches_truth

from str_kernels import project, safety_linear_cross_entropy

pytestmark = pytest.mark.gpu

BACKENDS = ["eager", "torch", "triton"]
OURS = ["torch", "triton"]
LEAVES = ("hidden", "linear_weight", "linear_bias", "low_rank_t", "low_rank_b")
EXTRAS = {"kind": "logprob", "label_smoothing": 0.1, "z_loss_weight": 0.02, "metrics": True}


def with_bias(case: Case, rng: torch.Generator) -> Case:
    bias = torch.randn(len(case.leaves["linear_weight"]), generator=rng)
    hidden, weight, t, b = case.leaves.values()
    bias = bias.to(hidden)
    return case.changed(leaves=dict(zip(LEAVES, (hidden, weight, bias, t, b), strict=True)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_it_is_the_merged_head(reduction: str, backend: str, rng, device) -> None:
    """t = s hidden A^T, as an adapter makes it: logits and gradients are those of W + s B A."""
    options = {"dtype": torch.float64, "reduction": reduction, "transform": "cap"}
    case = make_case(rng, device, path="linear+lora", **options, **ROW_WEIGHTS, **EXTRAS)
    hidden, weight, _, b = case.live_leaves().values()
    a = torch.randn(3, 24, generator=rng, dtype=torch.float64).to(device).requires_grad_()
    t = 0.5 * hidden @ a.t()
    leaves = {"hidden": hidden, "linear_weight": weight, "low_rank_t": t, "low_rank_b": b}
    adapted = case.loss(leaves, backend)
    adapted.loss.backward(case.cotangent(adapted.loss))
    got = [x.grad for x in (hidden, weight, a, b)]

    hidden, weight, a, b = (x.detach().requires_grad_() for x in (hidden, weight, a, b))
    merged = weight + 0.5 * b @ a
    plain = case.loss({"hidden": hidden, "linear_weight": merged}, backend)
    plain.loss.backward(case.cotangent(plain.loss))
    close = {"rtol": 1e-10, "atol": 1e-12}
    for mine, wanted in zip(adapted, plain, strict=True):
        torch.testing.assert_close(mine, wanted, **close)
    for mine, x in zip(got, (hidden, weight, a, b), strict=True):
        torch.testing.assert_close(mine, x.grad, **close)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 16])
@pytest.mark.parametrize("bias", [False, True])
def test_every_dtype(backend, dtype, rank, bias, rng, device) -> None:
    """In chunks of three rows, with both of the head's other parts."""
    options = {"dtype": dtype, "rank": rank, "transform": "cap"}
    case = make_case(rng, device, path="linear+lora", **options, **EXTRAS)
    case = with_bias(case, rng) if bias else case
    case = case.with_options(chunk_bytes=3 * 304 * dtype.itemsize)
    assert_matches_truth(case, case.run(backend), backend)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "frozen",
    [set(some) for n in range(5) for some in itertools.combinations(LEAVES, n)],
    ids=lambda some: "+".join(sorted(some)) or "nothing",
)
def test_frozen_leaves_get_nothing_and_the_others_the_same(reduction, frozen, rng, device) -> None:
    case = make_case(rng, device, path="linear+lora", reduction=reduction, vocab=37)
    case = with_bias(case, rng)
    everything = case.run("torch")
    result = case.changed(frozen=frozenset(frozen)).run("torch")
    for name, grad in everything.grads.items():
        if name in frozen:
            assert result.grads[name] is None
        else:
            assert torch.equal(result.grads[name], grad), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adapter_of_zeros_changes_nothing(backend: str, rng, device) -> None:
    """LoRA starts with B = 0: the loss is that of the head alone, and only B has a gradient."""
    case = make_case(rng, device, path="linear+lora")
    case = case.with_leaves(low_rank_b=torch.zeros_like(case.leaves["low_rank_b"]))
    fresh = case.run(backend)
    names = ("hidden", "linear_weight")
    bare = case.changed(leaves={name: case.leaves[name] for name in names}).run(backend)
    assert torch.equal(fresh.terms.loss, bare.terms.loss)
    for name in names:
        assert torch.equal(fresh.grads[name], bare.grads[name])
    assert not fresh.grads["low_rank_t"].any() and fresh.grads["low_rank_b"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rank_0(backend: str, rng, device) -> None:
    case = make_case(rng, device, path="linear+lora", rank=0)
    result = case.run(backend)
    assert result.grads["low_rank_t"].shape == (7, 0)
    assert_matches_truth(case, result, backend)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("how", ["transposed", "inside a wider one", "expanded"])
def test_strides(backend: str, how: str, rng, device) -> None:
    case = make_case(rng, device, path="linear+lora")
    t, b = case.leaves["low_rank_t"], case.leaves["low_rank_b"]
    if how == "transposed":
        other = case.with_leaves(low_rank_t=t.t().contiguous().t(), low_rank_b=b.t().clone().t())
    elif how == "inside a wider one":
        pad = torch.nn.functional.pad
        wide = [pad(x, (2, 3, 1, 1), value=77.0)[1:-1, 2:-3] for x in (t, b)]
        other = case.with_leaves(low_rank_t=wide[0], low_rank_b=wide[1])
    else:  # the same row for all of them, without memory of its own
        t, b = t[:1].expand(7, 3), b[:1].expand(len(b), 3)
        other = case.with_leaves(low_rank_t=t, low_rank_b=b)
        case = case.with_leaves(low_rank_t=t.clone(), low_rank_b=b.clone())
    got = other.run(backend)
    assert_matches_truth(case, got, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("pack_rows", [True, False])
def test_a_row_that_does_not_take_part_leaks_nothing(
    backend, reduction, pack_rows, rng, device
) -> None:
    options = {"reduction": reduction, "pack_rows": pack_rows}
    case = make_case(rng, device, path="linear+lora", **options, **EXTRAS)
    case.target[3:5] = -100
    clean = case.run(backend)
    hidden, t = case.leaves["hidden"].clone(), case.leaves["low_rank_t"].clone()
    hidden[3], t[3], t[4] = torch.nan, torch.nan, torch.inf
    assert_same(case.with_leaves(hidden=hidden, low_rank_t=t).run(backend), clean)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_the_adapter_too(backend: str, dtype, rng, device) -> None:
    case = with_bias(make_case(rng, device, path="linear+lora", counts="numbers"), rng)
    got = case.run(backend, autocast=dtype)
    assert_same(got, case.in_dtype(dtype).run(backend))
    assert {grad.dtype for grad in got.grads.values()} == {torch.float32}


def test_project_of_an_adapted_head(rng, device) -> None:
    case = make_case(rng, device, path="linear+lora", transform="scale+cap", dtype=torch.float64)
    options = {name: case.options[name] for name in ("logit_scale", "softcap")}

    def run(hidden, weight, t, b):
        return project(hidden, weight, case.ids, low_rank=(t, b), **options)

    leaves = tuple(case.live_leaves().values())
    assert torch.autograd.gradcheck(run, leaves)
    z = 5.0 * torch.tanh(1.3 * case.raw_logits() / 5.0)
    torch.testing.assert_close(run(*leaves).detach(), z[:, case.ids], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", OURS)
def test_the_head_is_neither_copied_nor_merged(backend: str, rng, device) -> None:
    """Frozen W: nothing of its size, for what a merge would make anew in every step."""
    rows, vocab, dim = 8, 4096, 64
    case = make_case(rng, device, path="linear+lora", rows=rows, vocab=vocab, dim=dim, rank=2)
    case = case.changed(frozen=frozenset({"linear_weight"}))
    case = case.with_options(chunk_bytes=2 * vocab * 4)
    case.run(backend)  # what is made once
    # a chunk and the scratch of the torch row step, B's gradient, its product with the upstream
    allowed = 4 * 2 * vocab * 4 + 3 * vocab * 2 * 4 + (48 << 10)
    assert allowed < vocab * dim * 4
    peak = peak_bytes(lambda: case.run(backend), device)
    assert peak < allowed, f"{peak} bytes; {vocab * dim * 4} for (V, D)"


def test_a_list_is_a_pair_too(rng, device) -> None:
    case = make_case(rng, device, path="linear+lora")
    hidden, weight, t, b = case.leaves.values()
    options = {key: value for key, value in case.options.items() if key != "chunk_bytes"}
    given = (hidden, weight, case.target, case.ids, case.ref)
    a = safety_linear_cross_entropy(*given, low_rank=[t, b], **options)
    b = safety_linear_cross_entropy(*given, low_rank=(t, b), **options)
    assert torch.equal(a.loss, b.loss)
