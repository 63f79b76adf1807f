"""The positions of a batch where the penalty is taken, and their place in the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...attach_options import Positions
from ...op import IGNORE_INDEX
from .references import Reference

ROW_WEIGHT = "safety_row_weight"
"""Key in a batch: the weight of each position (B, T), from AnchorCollator; replaces `positions`."""


def row_weight_at(
    positions: Positions,
    target: Tensor,  # (B, T)
    attention_mask: Any,
) -> Tensor | None:  # (B, T)
    """Return a mask of positions, or None for every label (and for "none")."""
    if positions == "none" or positions == "response":
        return None
    if positions == "all":
        inside = torch.ones_like(target, dtype=torch.bool)
        length = target.shape[1]
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            # the last columns, since prefix tuning puts those of its cache before them
            inside = attention_mask[:, -length:].to(target.device).bool()
        follows = nn.functional.pad(inside[:, 1:], (0, 1), value=False)
        return inside & follows
    kept = target != IGNORE_INDEX
    count = kept.cumsum(dim=1)
    # number of labels before the current run of labels, so that each response counts from 1
    before = torch.where(kept, 0, count).cummax(dim=1).values
    return kept & (count - before <= positions)


def beside(
    ref: Tensor,  # (B, T', K)
    target: Tensor,  # (B, T)
    row_weight: Tensor | None,  # (B, T)
    reference: Reference,
) -> tuple[Tensor, Tensor | None]:  # (B, T, K), (B, T)
    """Align the reference with the student, with weight 0 where the reference has no logits.

    If the reference has fewer positions, the student's first ones are virtual tokens. A shortened
    reference does not read the last ones.
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
