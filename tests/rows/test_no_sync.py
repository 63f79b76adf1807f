"""Nothing in the default path waits for a GPU, and so a CUDA graph can capture it.

A tensor on the device "meta" has a shape and no values: an op that asks one of it for a value, or
for a shape that depends on values, raises. So the ops' own code is run on such tensors.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from cases import make_case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from str_kernels import SafetyPenalty, project, safety_cross_entropy, safety_linear_cross_entropy
from str_kernels.op import autograd
from str_kernels.op.contracts import RowOptions
from str_kernels.op.loss_args import LossOptions, make_loss_args
from str_kernels.op.rows.rows_torch import row_step_torch

OPTIONS = {"metrics": True, "label_smoothing": 0.1, "z_loss_weight": 0.1, "softcap": 3.0}


@pytest.fixture
def no_autocast(monkeypatch) -> None:
    """Autocast knows no device "meta"."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


def on_meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def linear_inputs(kind: str, reduction: str, pack: bool) -> tuple:
    hidden, weight = on_meta(40, 8, dtype=torch.bfloat16), on_meta(100, 8, dtype=torch.bfloat16)
    low_rank = on_meta(40, 2, dtype=torch.bfloat16), on_meta(100, 2, dtype=torch.bfloat16)
    ids = on_meta(40, dtype=torch.int64), on_meta(5, dtype=torch.int64)
    penalty = SafetyPenalty(0.1, kind)
    options = {"penalty": penalty, "reduction": reduction, "backend": "torch", **OPTIONS}
    args = make_loss_args(hidden, *ids, on_meta(40, 5), LossOptions(**options))
    needs = (True, True, False, True, True)
    return (hidden, weight, None, *low_rank, *args.flat(), 16, pack, *needs)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["mse", "logprob", "subset_kl"])
def test_the_linear_path_asks_for_no_value(kind, reduction, no_autocast) -> None:
    inputs = linear_inputs(kind, reduction, pack=False)
    loss, *_ = autograd._linear_op._init_fn(*inputs)
    assert loss.is_meta
    upstream = on_meta(40) if reduction == "none" else on_meta()
    grads = autograd._linear_grad_op._init_fn(*inputs, upstream)
    assert [tuple(grad.shape) for grad in grads] == [(40, 8), (100, 8), (0,), (40, 2), (100, 2)]


def test_packing_does_and_is_noticed(no_autocast) -> None:
    with pytest.raises(NotImplementedError, match="nonzero"):
        autograd._linear_op._init_fn(*linear_inputs("mse", "mean", pack=True))


@pytest.mark.parametrize("kind", ["mse", "logprob", "subset_kl"])
def test_the_logits_path_asks_for_no_value(kind, no_autocast) -> None:
    inputs = linear_inputs(kind, "mean", pack=False)
    args = inputs[5:-7]
    logits = on_meta(40, 100, dtype=torch.bfloat16)
    *_, norm = autograd._logits_forward(logits, *args)
    assert autograd._logits_grad_op._init_fn(logits, *args, norm, on_meta()).shape == (40, 100)


def test_the_row_step_by_itself(no_autocast) -> None:
    rows = {"ce_scale": on_meta(3), "penalty_scale": on_meta(3), "grad": on_meta(3, 50)}
    ids = on_meta(4, dtype=torch.int64)
    given = on_meta(3, 50), on_meta(3, dtype=torch.int64), ids, None, on_meta(3, 4), on_meta(4)
    assert row_step_torch(*given, RowOptions(metrics=True), **rows).entropy.shape == (3,)


def test_the_tokens_weights_are_copied_once() -> None:
    penalty = SafetyPenalty(id_weights=torch.tensor([1.0, 2.0]))
    device = torch.device("meta")
    copy = penalty.id_weights_on(device, torch.float32)
    assert copy.is_meta and penalty.id_weights_on(device, torch.float32) is copy
    penalty.id_weights[0] = 3.0  # written to since
    assert penalty.id_weights_on(device, torch.float32) is not copy
    here = penalty.id_weights
    assert penalty.id_weights_on(here.device, here.dtype) is here
    wide = penalty.id_weights_on(here.device, torch.float64)
    assert wide.tolist() == [3.0, 2.0] and wide.dtype == torch.float64


class Casts(TorchDispatchMode):
    """Note the shapes of what changes its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.shapes.add(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_project_casts_the_ids_rows_and_not_the_head(device) -> None:
    hidden, head = torch.randn(3, 8, device=device), torch.randn(100, 8, device=device)
    ids = torch.tensor([5, 50], device=device)
    with Casts() as casts, torch.autocast(device.type, dtype=torch.bfloat16):
        found = project(hidden, head, ids)
    rounded = (x.bfloat16().float() for x in (hidden, head))
    wanted = torch.nn.functional.linear(*rounded)[:, ids]
    torch.testing.assert_close(found, wanted)
    assert (2, 8) in casts.shapes and (100, 8) not in casts.shapes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_cuda_graph_captures_both_paths(backend, rng, device, clean_memory) -> None:
    for path, loss_of in (
        ("logits", safety_cross_entropy),
        ("linear", safety_linear_cross_entropy),
    ):
        case = make_case(rng, device, path=path, rows=64, vocab=512)
        leaves = case.live_leaves()
        tensors = (*leaves.values(), case.target, case.ids, case.ref)

        def step(loss_of=loss_of, tensors=tensors, leaves=leaves, case=case):
            loss = loss_of(*tensors, penalty=case.options["penalty"], backend=backend).loss
            return loss, torch.autograd.grad(loss, list(leaves.values()))

        wanted = step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured[0], wanted[0])
        for mine, other in zip(captured[1], wanted[1], strict=True):
            assert torch.equal(mine, other)
