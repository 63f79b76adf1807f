"""The definition once more, row by row, beside eager and torch's cross_entropy.

The rule in `tolerance` takes the rows' errors from it; test_penalties holds eager to it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from cases import ON_LOG_PROBS, Case, cap
from torch import Tensor

from str_kernels import SafetyPenalty


class Rows(NamedTuple):
    """What each row's terms are, before any weight; (N,) each."""

    ce: Tensor
    z_loss: Tensor
    penalty: Tensor
    drift: Tensor  # max_k |d_k|
    size: Tensor  # the largest |z_S| + |r| (+ |lse|, where that is subtracted too)
    lse: Tensor
    entropy: Tensor
    top: Tensor  # max_v z_v
    ahead: Tensor  # z_y minus the largest other logit


def row_terms(case: Case) -> Rows:
    """Return each row's terms, in the case's dtype.

    A third statement of the definition, beside eager and the row steps. It imports nothing of the
    package, and takes from torch what torch has.
    """
    options = case.options
    wide = torch.promote_types(case.dtype, torch.float32)
    held = case.ids is not None and case.ids.numel() and case.ref is not None
    if case.linear and held and options["penalty"].kind in ON_LOG_PROBS:
        case_logits = case.in_dtype(wide).raw_logits()  # unrounded, in 16 bits too
    else:
        case_logits = case.raw_logits().to(wide)
    z = cap(case_logits, options)
    rows = z.shape[0]
    kept = case.target != options["ignore_index"]
    column = torch.where(kept, case.target, 0)
    ce = torch.nn.functional.cross_entropy(
        z, column, reduction="none", label_smoothing=options["label_smoothing"]
    )
    ce = torch.where(kept, ce, 0)
    lse = z.logsumexp(1)
    p = z.softmax(1)
    entropy = torch.where(p > 0, -p * z.log_softmax(1), 0).sum(1)
    z_y = z.gather(1, column[:, None])[:, 0]
    others = z.scatter(1, column[:, None], -torch.inf).amax(1)
    z_loss = torch.where(kept, options["z_loss_weight"] * lse.square(), 0)
    nothing = torch.zeros(rows, dtype=wide, device=z.device)
    common = {"lse": lse, "entropy": entropy, "top": z.amax(1), "ahead": z_y - others}
    if case.ids is None or not case.ids.numel() or case.ref is None:
        return Rows(ce, z_loss, nothing, nothing, nothing, **common)
    if case.linear:  # the safety logits are a product of their own, in full precision
        z = cap(case.in_dtype(wide).raw_logits(), options)
    z_s, ref = z[:, case.ids], case.ref.to(wide).expand(rows, -1)
    penalty = options["penalty"]
    ids = case.ids.numel()
    a = torch.ones(ids, dtype=wide, device=z.device)
    if penalty.id_weights is not None:
        a = penalty.id_weights.to(wide)
    size = (z_s.abs() + ref.abs()).amax(1)
    if penalty.kind in ON_LOG_PROBS:
        z_s, size = z_s - lse[:, None], size + lse.abs()
    phi = phi_of(penalty, z_s, ref, a)
    return Rows(ce, z_loss, phi, (z_s - ref).abs().amax(1), size, **common)


def pulls(case: Case, scale: Tensor) -> Tensor:  # (N, K)
    """Return the gradient of sum scale phi at the raw safety logits, with lse held still.

    On the linear path that is what goes through `project`; what goes through lse does not. `scale`
    is (N,) float64, as the result.
    """
    rows, penalty = scale.shape[0], case.options["penalty"]
    if case.ids is None or case.ref is None or not case.ids.numel() or not rows:
        return scale.new_zeros(rows, 0 if case.ids is None else case.ids.numel())
    raw = case.in_dtype(torch.float64).raw_logits().detach()
    raw_s = raw[:, case.ids].requires_grad_()
    z_s = cap(raw_s, case.options)
    if penalty.kind in ON_LOG_PROBS:
        z_s = z_s - cap(raw, case.options).logsumexp(1, keepdim=True)
    a = penalty.id_weights
    a = raw.new_ones(case.ids.numel()) if a is None else a.to(raw.dtype)
    phi = phi_of(penalty, z_s, case.ref.to(raw.dtype).expand(rows, -1), a)
    (pull,) = torch.autograd.grad(phi.sum(), raw_s)
    return torch.where(scale[:, None] != 0, scale[:, None] * pull, 0)


def phi_of(penalty: SafetyPenalty, z_s: Tensor, ref: Tensor, a: Tensor) -> Tensor:  # (N,)
    """Return docs/loss.md's phi; z_s are log-probabilities where ref is, see ON_LOG_PROBS."""
    loss = torch.nn.functional
    if penalty.kind == "huber":
        return (a * loss.huber_loss(z_s, ref, reduction="none", delta=penalty.delta)).mean(1)
    if penalty.kind == "hinge":
        return (a * torch.relu(ref - z_s).square()).mean(1)
    if penalty.kind == "centered":  # the weighted variance of d, without its normalisation
        d = z_s - ref
        centre = torch.einsum("nk,k->n", d, a) / a.sum()
        return (a * (d - centre[:, None]).square()).mean(1)
    if penalty.kind == "subset_kl":
        t, taken = penalty.temperature, a > 0  # an id of weight 0 has no share q
        log_q = (ref[:, taken] / t + a[taken].log()).log_softmax(1)
        log_s = (z_s / t).log_softmax(1)[:, taken]
        return t**2 * loss.kl_div(log_s, log_q, reduction="none", log_target=True).sum(1)
    if penalty.kind == "coarse_kl":  # Bregman's divergence of x log x, of each token and the rest
        z_s, ref, a = z_s[:, a > 0], ref[:, a > 0], a[a > 0]  # the others are of the rest
        p, q = z_s.exp(), ref.exp()
        rest, ref_rest = ((1 - x.sum(1)).clamp(min=2.0**-13) for x in (p, q))
        each = loss.kl_div(z_s, ref, reduction="none", log_target=True) + p - q
        others = loss.kl_div(rest.log(), ref_rest, reduction="none") + rest - ref_rest
        return (a * each).sum(1) + others
    return (a * loss.mse_loss(z_s, ref, reduction="none")).mean(1)


class Coarse(NamedTuple):
    """What "coarse_kl" compares, in float64."""

    p: Tensor  # (N, K)
    q: Tensor  # (N, K)
    rest: Tensor  # (N,)
    ref_rest: Tensor  # (N,)
    a: Tensor  # (K,)


def coarse_of(case: Case) -> Coarse:
    z = cap(case.in_dtype(torch.float64).raw_logits(), case.options)
    assert case.ids is not None and case.ref is not None
    p = z.log_softmax(1)[:, case.ids].exp()
    q = case.ref.double().expand(len(z), -1).exp()
    a = case.options["penalty"].id_weights
    a = p.new_ones(p.shape[1]) if a is None else a.double()
    p, q, a = p[:, a > 0], q[:, a > 0], a[a > 0]
    return Coarse(p, q, *((1 - x.sum(1)).clamp(min=2.0**-13) for x in (p, q)), a)
