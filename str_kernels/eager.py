"""The truth: the loss in plain PyTorch, no chunks, no hand-written gradient.

Every other implementation is tested against this one in float64. It is slow and hungry on purpose:
it makes the float32 logits and lets autograd do the rest, second derivatives included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_values
from .contracts import LossArgs, SafetyLoss, accumulation_dtype
from .projection import project, scale_and_cap


def eager_linear_cross_entropy(
    hidden: Tensor,  # (N, D)
    linear_weight: Tensor,  # (V, D)
    linear_bias: Tensor | None,  # (V,)
    args: LossArgs,
) -> SafetyLoss:
    """Make all logits with the head's own product, the safety logits with `project`."""
    hidden = torch.where(args.takes_part().unsqueeze(1), hidden, torch.zeros_like(hidden))
    safety_logits = project(
        hidden,
        linear_weight,
        args.safety_ids,
        linear_bias,
        logit_scale=args.logit_scale,
        softcap=args.softcap,
    )
    logits = torch.nn.functional.linear(hidden, linear_weight, linear_bias)
    return eager_cross_entropy(logits, args, safety_logits)


def eager_cross_entropy(
    logits: Tensor,  # (N, V) raw head outputs
    args: LossArgs,
    safety_logits: Tensor | None = None,  # (N, K)
) -> SafetyLoss:
    """Compute docs/loss.md's definition, line by line."""
    check_values(args.target, args.safety_ids, logits.shape[1], args.ignore_index)
    raw = logits.to(accumulation_dtype(logits.dtype))
    # A row without a loss is replaced before anything is computed from it: a product with 0, or a
    # mask on the result alone, would let its inf or NaN into the gradient.
    has_ce = (args.row_ce != 0).unsqueeze(1)
    has_penalty = (args.row_safety != 0).unsqueeze(1)
    ce_logits = scale_and_cap(
        torch.where(has_ce, raw, torch.zeros_like(raw)), args.logit_scale, args.softcap
    )
    kept_target = torch.where(
        args.target == args.ignore_index, torch.zeros_like(args.target), args.target
    )
    top = ce_logits.detach().amax(dim=1)
    shifted = ce_logits - top.unsqueeze(1)
    # (lse - m) - (z_y - m): the small numbers are subtracted, not the large ones
    per_row_ce = torch.logsumexp(shifted, dim=1) - shifted.gather(1, kept_target[:, None])[:, 0]
    ce = (args.row_ce * per_row_ce).sum() * args.inv_items

    if safety_logits is None:
        raw_s = raw.index_select(1, args.safety_ids)
        raw_s = torch.where(has_penalty, raw_s, torch.zeros_like(raw_s))
        safety_logits = scale_and_cap(raw_s, args.logit_scale, args.softcap)
    drift = torch.where(has_penalty, safety_logits - args.ref, torch.zeros_like(safety_logits))
    per_row_penalty = (args.id_weights * drift.square()).sum(dim=1) / max(len(args.safety_ids), 1)
    penalty = (args.row_safety * per_row_penalty).sum() * args.inv_safety_items
    loss = ce + weighted(args.penalty_weight, penalty)
    return SafetyLoss(loss, ce.detach(), penalty.detach(), max_over(drift.detach().abs()))


def weighted(weight: Tensor, penalty: Tensor) -> Tensor:
    """Return weight * penalty, and 0 for weight 0 even where the penalty is inf or NaN."""
    return torch.where(weight != 0, weight * penalty, torch.zeros_like(penalty))


def max_over(values: Tensor) -> Tensor:
    """Return the largest value, 0 for an empty tensor (a step without rows or without ids)."""
    return values.amax() if values.numel() else values.new_zeros(())
