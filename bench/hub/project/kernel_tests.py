"""Test the kernel as the `kernels` library loads it against plain PyTorch in float64."""

from pathlib import Path

import pytest
import torch
from kernels import get_local_kernel

kernel = get_local_kernel(Path(__file__).parents[1])

ROWS, VOCAB, DIM = 6, 37, 8  # divided by no block size
IDS = torch.tensor([2, 11, 30])
DEVICE = torch.accelerator.current_accelerator() or torch.device("cpu")


def draw(dtype):
    generator = torch.Generator().manual_seed(2604)
    sizes = ((ROWS, DIM), (VOCAB, DIM), (ROWS, len(IDS)))
    hidden, weight, ref = (torch.randn(size, generator=generator) for size in sizes)
    target = torch.randint(VOCAB, (ROWS,), generator=generator).to(DEVICE)
    leaves = [x.to(DEVICE, dtype).requires_grad_() for x in (hidden, weight)]
    return leaves, target, IDS.to(DEVICE), ref.to(DEVICE, dtype)


def by_hand(leaves, target, ids, ref):
    logits = leaves[0] @ leaves[1].T
    drift = (logits[:, ids] - ref).square().mean()
    return torch.nn.functional.cross_entropy(logits, target) + 0.5 * drift


def fused(leaves, target, ids, ref):
    penalty = kernel.SafetyPenalty(weight=0.5, kind="mse")
    return kernel.safety_linear_cross_entropy(*leaves, target, ids, ref, penalty=penalty).loss


def fused_from_logits(leaves, target, ids, ref):
    penalty = kernel.SafetyPenalty(weight=0.5, kind="mse")
    logits = leaves[0] @ leaves[1].T
    return kernel.safety_cross_entropy(logits, target, ids, ref, penalty=penalty).loss


def compiled(*args):
    return torch.compile(fused, fullgraph=True, backend="aot_eager")(*args)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", [fused, fused_from_logits, compiled])
def test_loss_and_gradients(way, dtype):
    truth_leaves, *rest = draw(torch.float64)
    truth = by_hand(truth_leaves, *rest)
    truth.backward()
    leaves, *rest = draw(dtype)
    loss = way(leaves, *rest)
    loss.backward()
    # some thousand units in the last place of either
    rtol, atol = (1e-12, 1e-13) if dtype == torch.float64 else (1e-4, 1e-6)
    torch.testing.assert_close(loss.double(), truth, rtol=rtol, atol=atol)
    for leaf, expected in zip(leaves, truth_leaves, strict=True):
        torch.testing.assert_close(leaf.grad.double(), expected.grad, rtol=rtol, atol=atol)
