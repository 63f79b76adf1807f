"""At which positions of a batch the penalty is taken, and where the reference has them too."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ...op import IGNORE_INDEX, PenaltyKind, SafetyPenalty
from .references import Reference

ROW_WEIGHT = "safety_row_weight"
"""In a batch: w of each position (B, T), instead of `positions`, as AnchorCollator makes it."""
Positions = Literal["none", "response", "all"] | int
"""Where the penalty stands on the training rows.

Nowhere (at the anchors alone); at every label, the paper's form; at every position whose next token
is not padding; at the first m labels of a response.
"""


def check_positions(positions: object) -> None:
    """Raise ValueError unless it is one of Positions."""
    number = isinstance(positions, int) and not isinstance(positions, bool) and positions >= 1
    if not number and positions not in ("none", "response", "all"):
        raise ValueError(
            "`positions` must be 'none' (anchors alone), 'response' (the paper's form), 'all' or "
            f"an int >= 1; got {positions!r}"
        )


def default_penalty(positions: Positions) -> SafetyPenalty:
    """Return the penalty that is taken unless another is given.

    At anchors alone what the study found best (docs/method.md); on rows the paper's form.
    """
    return SafetyPenalty(0.1, "coarse_kl") if positions == "none" else SafetyPenalty()


def chosen_penalty(
    positions: Positions,
    weight: float | None = None,
    kind: str | None = None,
    temperature: float = 1.0,
    delta: float = 1.0,
) -> SafetyPenalty:
    """Return the default penalty with what is given in its place."""
    default = default_penalty(positions)
    return SafetyPenalty(
        default.weight if weight is None else weight,
        default.kind if kind is None else cast(PenaltyKind, kind),
        temperature,
        delta,
    )


def check_anchor_options(alone: bool, has_anchors: bool, **given: object) -> None:
    """Refuse options of the anchors that would have no effect.

    Args:
        alone: whether the penalty stands at anchors alone.
        has_anchors: whether there are any.
        given: by name the penalty's weight, the anchors' own, and their other options, each None
            where it was not given.

    Raises:
        ValueError: names the option.
    """
    weight, *of_anchors = given
    if alone and given[weight] is not None and given[of_anchors[0]] is not None:
        raise ValueError(
            f"`{of_anchors[0]}` must be left out where the penalty stands at anchors alone and "
            f"`{weight}` is given, which is theirs too; got {given[of_anchors[0]]!r}"
        )
    for name in of_anchors:
        if not has_anchors and given[name] is not None:
            raise ValueError(
                f"`{name}` must be left out where there are no anchors; got {given[name]!r}"
            )


def read_positions(text: object) -> Positions:
    """Return what a flag or a YAML key says, where "3" is a number."""
    word = str(text)
    return int(word) if word.isdigit() else word  # type: ignore[return-value] # to be checked


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
