"""The reference implementation: the loss in plain PyTorch, without chunks or hand-written gradient.

Every other implementation is tested against this one in float64. It is deliberately simple, slow
and memory-hungry: it computes all logits in float32, and autograd derives every gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_values
from .contracts import LossArgs, SafetyLoss, accumulation_dtype
from .penalties import KINDS, ON_LOG_PROBS, subset_of
from .projection import Head, project_head, scale_and_cap


def eager_linear_cross_entropy(hidden: Tensor, head: Head, args: LossArgs) -> SafetyLoss:
    """Compute all logits with the head's matrix product, and the safety logits with `project`."""
    options = args.options
    takes_part = args.takes_part().unsqueeze(1)
    hidden = torch.where(takes_part, hidden, torch.zeros_like(hidden))
    if head.t is not None:
        head = head._replace(t=torch.where(takes_part, head.t, torch.zeros_like(head.t)))
    safety_logits = project_head(
        hidden, head, args.safety_ids, options.logit_scale, options.softcap
    )
    if options.kind in ON_LOG_PROBS:  # lse must be as precise as the safety logits
        wide = accumulation_dtype(hidden.dtype)
        hidden = hidden.to(wide)
        head = Head(*(None if part is None else part.to(wide) for part in head))  # type: ignore[arg-type] # as it was
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias)
    if head.t is not None and head.b is not None:
        logits = torch.addmm(logits, head.t, head.b.t())
    return eager_cross_entropy(logits, args, safety_logits)


def eager_cross_entropy(
    logits: Tensor,  # (N, V) raw head outputs
    args: LossArgs,
    safety_logits: Tensor | None = None,  # (N, K)
) -> SafetyLoss:
    """Compute the definition in docs/loss.md, line by line."""
    options = args.options
    check_values(args.target, args.safety_ids, logits.shape[1], options.ignore_index)
    raw = logits.to(accumulation_dtype(logits.dtype))
    # A row without a loss is replaced by 0 before anything is computed from it: multiplying or
    # masking only the result would let its inf or NaN into the gradient.
    z = scale_and_cap(_rows_where(args.row_ce != 0, raw), options.logit_scale, options.softcap)
    target = torch.where(args.target == options.ignore_index, 0, args.target)
    top, lse_from_top = _norm(z)
    shifted = z - top.unsqueeze(1)
    # (lse - m) - (z_y - m): subtracts small numbers, not the large lse and z_y
    rows_ce = lse_from_top - shifted.gather(1, target.unsqueeze(1)).squeeze(1)
    if options.label_smoothing > 0:
        smooth = lse_from_top - shifted.mean(dim=1)
        rows_ce = (1 - options.label_smoothing) * rows_ce + options.label_smoothing * smooth
    rows_loss = rows_ce
    if options.z_loss_weight > 0:
        rows_loss = rows_ce + options.z_loss_weight * (top + lse_from_top).square()

    takes_penalty = args.row_safety != 0
    raw = _rows_where(takes_penalty, raw)
    if safety_logits is None:
        raw_s = raw.index_select(1, args.safety_ids)
        safety_logits = scale_and_cap(raw_s, options.logit_scale, options.softcap)
    # with weight 0, leave out the penalty's gradient, which may be inf or NaN
    has_weight = args.penalty_weight != 0
    safety_logits = torch.where(has_weight, safety_logits, safety_logits.detach())
    lse = None
    if options.kind in ON_LOG_PROBS:
        held_top, held_lse = _norm(scale_and_cap(raw, options.logit_scale, options.softcap))
        lse = held_top + torch.where(has_weight, held_lse, held_lse.detach())
    ref = _rows_where(takes_penalty, args.ref)
    subset = subset_of(
        _rows_where(takes_penalty, safety_logits), ref, args.id_weights, lse, options
    )
    rows_penalty = torch.where(takes_penalty, KINDS[options.kind].phi(subset), 0.0)
    drift = torch.where(takes_penalty, max_over_rows(subset.drift.detach().abs()), 0.0)

    right = entropy = None
    if options.metrics:
        with torch.no_grad():
            right = (z.argmax(dim=1) == target).to(z.dtype)
            entropy = torch.special.entr(z.softmax(dim=1)).sum(dim=1)
    return reduce_rows(args, rows_ce, rows_loss, rows_penalty, drift, right, entropy)


def reduce_rows(
    args: LossArgs,
    ce: Tensor,  # (N,); rows without a CE weight are not used
    ce_and_z_loss: Tensor,  # (N,)
    penalty: Tensor,  # (N,)
    drift: Tensor,  # (N,)
    right: Tensor | None,  # (N,)
    entropy: Tensor | None,  # (N,)
) -> SafetyLoss:
    """Weight the rows and, unless the reduction is "none", sum them."""

    def of(weight: Tensor, value: Tensor, inverse_count: Tensor) -> Tensor:
        rows = torch.where(weight != 0, weight * value, 0.0)
        return (rows.sum() if args.reduce else rows) * inverse_count

    total = of(args.row_ce, ce_and_z_loss, args.inv_items)
    held = of(args.row_safety, penalty, args.inv_safety_items)
    # with weight 0 add 0, even if the penalty is inf or NaN
    loss = total + torch.where(args.penalty_weight != 0, args.penalty_weight * held, 0.0)
    drift = torch.where(args.row_safety != 0, drift, 0.0)
    counted = (args.row_ce != 0).to(ce.dtype)
    return SafetyLoss(
        loss,
        of(args.row_ce, ce.detach(), args.inv_items),
        held.detach(),
        max_over(drift) if args.reduce else drift,
        None if right is None else of(counted, right, args.inv_items),
        None if entropy is None else of(counted, entropy, args.inv_items),
    )


def max_over(values: Tensor) -> Tensor:
    """Return the largest value, 0 for an empty tensor (a step without rows or without ids)."""
    return values.amax() if values.numel() else values.new_zeros(())


def max_over_rows(values: Tensor) -> Tensor:
    """Return the largest value of each row, 0 for rows without ids."""
    return values.amax(dim=1) if values.shape[1] else values.new_zeros(values.shape[0])


def _rows_where(taken: Tensor, values: Tensor) -> Tensor:
    return torch.where(taken.unsqueeze(1), values, torch.zeros_like(values))


def _norm(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return m and lse - m."""
    top = z.detach().amax(dim=1)
    return top, torch.logsumexp(z - top.unsqueeze(1), dim=1)
