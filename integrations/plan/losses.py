"""Other ways to compute the loss that the planner compares: naively, and in a PyTorch loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...op import IGNORE_INDEX

_WEIGHT = 0.1


def loss_by_hand(
    logits: Tensor,  # (B, T, V)
    labels: Tensor,  # (B, T)
    safety_ids: Tensor,  # (K,)
    ref_logits: Tensor,  # (B, T, V)
) -> Tensor:  # ()
    """Compute the loss naively: with all logits of both models, in float32."""
    logits = logits.float()
    drift = logits[..., safety_ids] - ref_logits[..., safety_ids]
    target = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    ce = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE_INDEX)
    return ce + _WEIGHT * drift.square().mean()


def chunked_loss(
    hidden: Tensor,  # (N, D)
    head: nn.Module,
    target: Tensor,  # (N,)
    safety_ids: Tensor,  # (K,)
    ref: Tensor,  # (N, K)
    rows: int,
) -> Tensor:  # ()
    """Compute the same in a PyTorch loop over chunks, recomputing their logits in the backward."""

    def of_chunk(hidden: Tensor, target: Tensor, ref: Tensor) -> Tensor:
        logits = head(hidden).float()
        ce = F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="sum")
        drift: Tensor = logits[:, safety_ids] - ref
        return ce + _WEIGHT * drift.square().mean(dim=-1).sum()

    total: Tensor = hidden.new_zeros((), dtype=torch.float32)
    for part in zip(hidden.split(rows), target.split(rows), ref.split(rows), strict=True):
        made: Tensor = checkpoint(of_chunk, *part, use_reentrant=False)
        total = total + made
    return total / hidden.shape[0]
