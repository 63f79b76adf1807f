"""At which positions of a batch the penalty is taken, and where the reference has them too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...attach_options import Positions
from ...op import IGNORE_INDEX
from .references import Reference

ROW_WEIGHT = "safety_row_weight"
"""In a batch: w of each position (B, T), instead of `positions`, as AnchorCollator makes it."""


def row_weight_at(
    positions: Positions,
    target: Tensor,  # (B, T)
    attention_mask: Any,
) -> Tensor | None:  # (B, T)
    """Return w: None for every label (or where nothing is compared), or a mask of positions."""
    if positions == "none" or positions == "response":
        return None
    if positions == "all":
        inside = torch.ones_like(target, dtype=torch.bool)
        length = target.shape[1]
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            # the last columns: before them may be those of a cache that prefix tuning fills
            inside = attention_mask[:, -length:].to(target.device).bool()
        follows = nn.functional.pad(inside[:, 1:], (0, 1), value=False)
        return inside & follows
    kept = target != IGNORE_INDEX
    count = kept.cumsum(dim=1)
    # labels counted before the present run of labels: each response starts again at 1
    before = torch.where(kept, 0, count).cummax(dim=1).values
    return kept & (count - before <= positions)


def beside(
    ref: Tensor,  # (B, T', K)
    target: Tensor,  # (B, T)
    row_weight: Tensor | None,  # (B, T)
    reference: Reference,
) -> tuple[Tensor, Tensor | None]:  # (B, T, K), (B, T)
    """Align the reference with the student, and compare only where both have a position.

    The student's first positions are virtual tokens where the reference says that it has fewer;
    the last ones are not read by one that is shortened.
    """
    virtual = target.shape[1] - ref.shape[1]
    if reference.reads_tokens is not None:
        column = torch.arange(target.shape[1], device=target.device)
        weight = target != IGNORE_INDEX if row_weight is None else row_weight
        row_weight = weight * (column < reference.reads_tokens)
    if (
        ref.shape[0] != target.shape[0]
        or virtual < 0
        or (virtual and not reference.has_fewer_positions)
    ):
        raise ValueError(
            "the reference (`ref_model` or `reference`) must have a position for each of "
            f"{tuple(target.shape)} labels; it has {tuple(ref.shape[:2])}"
        )
    if virtual == 0:
        return ref, row_weight
    weight = target != IGNORE_INDEX if row_weight is None else row_weight
    real = torch.arange(target.shape[1], device=target.device) >= virtual
    return nn.functional.pad(ref, (0, 0, virtual, 0)), weight * real
