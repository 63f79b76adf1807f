"""The ops under torch.library's own checks and under torch.compile.

The backend is aot_eager: it runs dynamo and AOT autograd, which is where an op can be wrong, and
needs no C++ compiler.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch._dynamo.testing
from cases import PATHS, WEIGHTS, Case, make_case

from str_kernels import SafetyPenalty, safety_cross_entropy
from str_kernels.op import autograd, functional
from str_kernels.op.contracts import LossArgs

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("clean_memory")]

# torch.library.opcheck imports expecttest, which a machine for `make gpu` may lack.
NEEDS_EXPECTTEST = pytest.mark.skipif(
    importlib.util.find_spec("expecttest") is None, reason="torch.library.opcheck needs expecttest"
)
OURS = ["torch", "triton"]
HEAD_PARTS = ("hidden", "linear_weight", "linear_bias", "low_rank_t", "low_rank_b")


def everything(rng, device, path: str = "linear+bias", **options) -> Case:
    terms = {"kind": "logprob", "label_smoothing": 0.1, "z_loss_weight": 0.01, "metrics": True}
    sizes = {"rows": 6, "vocab": 37, "ids": 3, "dim": 8}
    return make_case(rng, device, path=path, **{**sizes, **WEIGHTS, **terms, **options})


def op_arguments(case: Case, backend: str, monkeypatch) -> tuple:
    """Return what an op is given by the public functions of a case."""
    seen = []
    name = "linear_cross_entropy" if case.linear else "cross_entropy"
    original = getattr(autograd, name)

    def spy(*args):
        seen.append(next(x for x in args if isinstance(x, LossArgs)))
        return original(*args)

    monkeypatch.setattr(functional.autograd, name, spy)
    case.loss(case.leaves, backend)
    monkeypatch.setattr(functional.autograd, name, original)
    return seen[0].flat()


@NEEDS_EXPECTTEST
@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("path", "needs"),
    [
        ("linear+bias", (True, True, True, False, False)),
        ("linear", (True, False, False, False, False)),
        ("linear+bias", (False, True, False, False, False)),
        ("linear+lora", (True, False, False, True, True)),
    ],
)
def test_opcheck_of_the_linear_op(
    backend, path, needs, reduction, rng, device, monkeypatch
) -> None:
    case = everything(rng, device, path, transform="cap", reduction=reduction)
    rest = op_arguments(case, backend, monkeypatch)
    pack = device.type == "cpu"
    leaves = [
        case.leaves[name].clone().requires_grad_(need) if name in case.leaves else None
        for name, need in zip(HEAD_PARTS, needs, strict=True)
    ]
    results = torch.library.opcheck(
        torch.ops.str_kernels.linear_cross_entropy.default, (*leaves, *rest, 4, pack, *needs)
    )
    assert set(results.values()) == {"SUCCESS"}


@NEEDS_EXPECTTEST
@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("suffix", ["", "_inplace_backward", "_grad", "_grad_"])
def test_opcheck_of_the_logits_ops(backend, suffix, rng, device, monkeypatch) -> None:
    case = everything(rng, device, "logits")
    rest = op_arguments(case, backend, monkeypatch)
    logits = case.leaves["logits"].clone()
    if suffix.startswith("_grad"):
        *_, norm = torch.ops.str_kernels.cross_entropy(logits, *rest)
        rest = (*rest, norm, torch.tensor(1.5, device=device))
    else:
        logits.requires_grad_()
    op = getattr(torch.ops.str_kernels, f"cross_entropy{suffix}").default
    assert set(torch.library.opcheck(op, (logits, *rest)).values()) == {"SUCCESS"}


def compiled(case: Case, backend: str, **options):
    @torch.compile(fullgraph=True, backend="aot_eager", **options)
    def run(target, ids, ref, **leaves):
        here = case.changed(target=target, ids=ids, ref=ref)
        return here.loss(leaves, backend)

    return run


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_is_the_same_without_a_graph_break(backend, path, reduction, rng, device) -> None:
    torch._dynamo.reset()
    options = {"counts": "numbers"} if reduction == "mean" else {"reduction": reduction}
    case = everything(rng, device, path, transform="scale+cap", **options)
    wanted = case.run(backend)
    leaves = case.live_leaves()
    run = compiled(case, backend)
    terms = run(case.target, case.ids, case.ref, **leaves)
    terms.loss.backward(case.cotangent(terms.loss))
    assert all(torch.equal(a, b) for a, b in zip(terms, wanted.terms, strict=True))
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, wanted.grads[name])
    with torch.no_grad():
        terms = run(case.target, case.ids, case.ref, **leaves)
    assert not terms.loss.requires_grad and torch.equal(terms.loss, wanted.terms.loss)


@pytest.mark.parametrize("path", PATHS)
def test_compiled_once_for_every_number_of_rows(path, rng, device) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    first = make_case(rng, device, path=path, rows=11, vocab=37)  # for its options

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def run(target, ids, ref, **leaves):
        return first.changed(target=target, ids=ids, ref=ref).loss(leaves, "torch").loss

    compilations = []
    for rows in (7, 9, 14):  # equal to no other size: dynamo would take them for the same
        case = make_case(rng, device, path=path, rows=rows, vocab=37)
        leaves = case.live_leaves()
        loss = run(case.target, case.ids, case.ref, **leaves)
        loss.backward()
        wanted = case.changed(upstream=1.0).run("torch")
        assert torch.equal(loss, wanted.terms.loss)
        for name, leaf in leaves.items():
            assert torch.equal(leaf.grad, wanted.grads[name])
        compilations.append(counter.frame_count)
    assert compilations[0] > 0 and len(set(compilations)) == 1


def test_a_schedule_of_the_weight_does_not_recompile(device) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    ids = torch.tensor([1, 2], device=device)
    target = torch.tensor([0, 3], device=device)
    ref = torch.zeros(2, 2, device=device)

    @torch.compile(fullgraph=True, backend=counter)
    def run(logits, weight, count):
        penalty = SafetyPenalty(weight=weight)
        options = {"penalty": penalty, "num_items": count, "backend": "torch"}
        return safety_cross_entropy(logits, target, ids, ref, **options)

    for weight, count in ((0.1, 2), (0.2, 3), (0.0, 4)):
        logits = torch.ones(2, 5, device=device, requires_grad=True)
        terms = run(logits, torch.tensor(weight), torch.tensor(count))
        terms.loss.backward()
        assert terms.loss.item() == pytest.approx(float(terms.ce) + weight * 1.0)
        assert float(terms.ce) == pytest.approx(2 / count * 1.6094379)
    assert counter.frame_count == 1


def test_compiled_under_autocast(rng, device) -> None:
    torch._dynamo.reset()
    case = everything(rng, device, counts="numbers").with_options(num_items=8191)
    run = compiled(case, "torch")
    leaves = case.live_leaves()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        terms = run(case.target, case.ids, case.ref, **leaves)
    terms.loss.backward()
    wanted = case.changed(upstream=1.0).run("torch", autocast=torch.bfloat16)
    assert torch.equal(terms.loss, wanted.terms.loss)
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == torch.float32 and torch.equal(leaf.grad, wanted.grads[name])
