"""The penalties in plain PyTorch: one table of kinds, each a value and its derivative.

A kind is a pair of functions of the drift d (n, K), which is z_S - r, or (z_S - lse) - r for kinds
in `ON_LOG_PROBS`. docs/loss.md has the formulas. `eager` uses the values and lets autograd derive
them; the torch row step uses both; the Triton kernel has its own copy in `_penalty`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .contracts import RowOptions

ON_LOG_PROBS = frozenset({"logprob", "coarse_kl"})
"""Kinds that compare log-probabilities, and so depend on every logit through lse."""

NEEDS_NORM = frozenset({"coarse_kl"})
"""Kinds whose gradient is not linear in lse: the row's norm is computed before its gradient."""

_LEAST_REST = 2.0**-13  # least probability of other tokens in "coarse_kl"; below, it is rounding


class Subset(NamedTuple):
    """The safety logits of some rows, and what they are compared with."""

    drift: Tensor  # (n, K)
    z: Tensor  # (n, K) the student's, after scale and cap
    ref: Tensor  # (n, K)
    a: Tensor  # (K,)
    options: RowOptions
    log_p: Tensor  # (n, K) z_S - lse, for kinds on log-probabilities

    def mean(self, values: Tensor) -> Tensor:
        """Return 1/K sum_k a_k values_k."""
        return (self.a * values).sum(dim=1) / max(self.a.shape[0], 1)

    def share(self) -> Tensor:
        """Return a / K, the weight of each id's term."""
        return self.a / max(self.a.shape[0], 1)


def subset_of(
    z: Tensor,  # (n, K)
    ref: Tensor,  # (n, K)
    id_weights: Tensor,  # (K,)
    lse: Tensor | None,  # (n,), for kinds on log-probabilities
    options: RowOptions,
) -> Subset:
    """Collect the inputs of a kind's functions."""
    log_p = z
    if options.kind in ON_LOG_PROBS and lse is not None:
        log_p = z - lse.unsqueeze(1)
    return Subset(log_p - ref, z, ref, id_weights, options, log_p)


def _clipped(s: Subset) -> Tensor:
    return s.drift.clamp(-s.options.delta, s.options.delta)


def _fallen(s: Subset) -> Tensor:
    return s.drift.clamp(max=0.0)


def _centered(s: Subset) -> Tensor:
    if not s.a.shape[0]:
        return s.drift
    return s.drift - (s.a * s.drift).sum(dim=1, keepdim=True) / s.a.sum()


def _log_shares(s: Subset) -> tuple[Tensor, Tensor]:
    """Return log s and log q of "subset_kl", each by log_softmax."""
    t = s.options.temperature
    return (s.z / t).log_softmax(dim=1), (s.ref / t + s.a.log()).log_softmax(dim=1)


def _kl(s: Subset) -> Tensor:
    log_s, log_q = _log_shares(s)
    q = log_q.exp()
    # 0 log 0 is 0: an id of weight 0 has q = 0
    gap = torch.where(q > 0, log_q - log_s, torch.zeros_like(log_s))
    return s.options.temperature**2 * (q * gap).sum(dim=1)


def _kl_slope(s: Subset) -> Tensor:
    log_s, log_q = _log_shares(s)
    return s.options.temperature * (log_s.exp() - log_q.exp())


def _coarse(s: Subset) -> tuple[Tensor, ...]:
    """Return p, q and the other tokens' probability in each, >= _LEAST_REST, for "coarse_kl".

    An id of weight 0 counts as one of the other tokens.
    """
    p, q = (torch.where(s.a > 0, x.exp(), torch.zeros_like(x)) for x in (s.log_p, s.ref))
    rests = (1.0 - x.sum(dim=1, keepdim=True) for x in (p, q))
    return p, q, *(rest.clamp(min=_LEAST_REST) for rest in rests)


def _coarse_kl(s: Subset) -> Tensor:
    p, q, rest, ref_rest = _coarse(s)
    # 0 log 0 is 0: an id to which the reference gives probability 0
    gap = torch.where(q > 0, -q * s.drift, torch.zeros_like(q))
    others = ref_rest * (ref_rest / rest).log() + (rest - ref_rest)
    return (s.a * (gap + (p - q))).sum(dim=1) + others.squeeze(1)


def _coarse_kl_slope(s: Subset) -> Tensor:
    p, q, rest, ref_rest = _coarse(s)
    others = torch.where(rest > _LEAST_REST, ref_rest / rest - 1.0, torch.zeros_like(rest))
    return s.a * (p - q) + p * others


class Kind(NamedTuple):
    """A penalty: its value per row, and its derivative with respect to d (z_S for subset_kl)."""

    phi: Callable[[Subset], Tensor]  # -> (n,)
    slope: Callable[[Subset], Tensor]  # -> (n, K)


_SQUARE = Kind(lambda s: s.mean(s.drift.square()), lambda s: 2 * s.share() * s.drift)

KINDS = {
    "mse": _SQUARE,
    "huber": Kind(
        lambda s: s.mean(_clipped(s) * (s.drift - _clipped(s) / 2)),
        lambda s: s.share() * _clipped(s),
    ),
    "hinge": Kind(lambda s: s.mean(_fallen(s).square()), lambda s: 2 * s.share() * _fallen(s)),
    "centered": Kind(
        lambda s: s.mean(_centered(s).square()), lambda s: 2 * s.share() * _centered(s)
    ),
    "logprob": _SQUARE,
    "subset_kl": Kind(_kl, _kl_slope),
    "coarse_kl": Kind(_coarse_kl, _coarse_kl_slope),
}
