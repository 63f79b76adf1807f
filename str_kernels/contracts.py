"""The types every layer agrees on: options in, result out, and what a row step is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""The target that means "this row has no cross-entropy", as in torch's own cross_entropy."""

PenaltyKind = Literal["mse"]
"""How a distance between safety logits is measured; docs/loss.md gives each one's formula."""

Backend = Literal["auto", "triton", "torch", "eager"]
"""Where a loss is computed; "auto" is triton on a GPU and torch elsewhere."""

Reduction = Literal["mean", "sum"]
"""`mean` divides by the counts, `sum` does not."""


@dataclass(frozen=True, eq=False)
class SafetyPenalty:
    """How far the safety logits may move, and what moving costs.

    For a row with student logits z_S and reference logits r on the K safety ids, weighted by a:

        mse:  penalty = 1/K * sum_k a_k (z_S_k - r_k)^2

    The exact distance, reduction and weight of the STR paper are not known to us: `mse` with mean
    reduction is a reconstruction, and 0.1 is a provisional weight, not the paper's.

    Args:
        weight: nats per squared logit, >= 0; 0 leaves plain cross-entropy while the penalty is
            still reported. A float, or a 0-d tensor that a schedule may change between steps.
        kind: the distance; "mse" is the only one in this release.
        id_weights: (K,) float >= 0, one factor a_k per safety id; all ones when None.

    Raises:
        TypeError: `id_weights` or a tensor `weight` is not of a floating-point dtype.
        ValueError: `weight` or an id weight is negative or not finite, a shape is wrong, or `kind`
            is unknown.

    References:
        Bach and Tran 2026, "Guardrails in Logit Space", arXiv:2604.17210.

    Examples:
        >>> SafetyPenalty(weight=0.5).kind
        'mse'
    """

    weight: float | Tensor = 0.1
    kind: PenaltyKind = "mse"
    id_weights: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(PenaltyKind):
            kinds = ", ".join(get_args(PenaltyKind))
            raise ValueError(f"`kind` must be one of {kinds}; got {self.kind!r}")
        _check_weight(self.weight)
        if self.id_weights is not None:
            check_id_weights(self.id_weights)


def _check_weight(weight: float | Tensor) -> None:
    if isinstance(weight, Tensor):
        if not weight.is_floating_point():
            raise TypeError(f"`weight` must be a floating-point tensor; got {weight.dtype}")
        if weight.dim() != 0:
            raise ValueError(f"`weight` must be a 0-d tensor; got shape {tuple(weight.shape)}")
        return  # its value is not read: that would wait for the device
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError(f"`weight` must be a number or a 0-d tensor; got {type(weight).__name__}")
    if not math.isfinite(weight) or weight < 0:
        raise ValueError(f"`weight` must be finite and >= 0; got {weight}")


def check_id_weights(id_weights: Tensor) -> None:
    """Check per-id factors: (K,), floating point, finite and >= 0."""
    if not isinstance(id_weights, Tensor) or not id_weights.is_floating_point():
        got = getattr(id_weights, "dtype", type(id_weights).__name__)
        raise TypeError(f"`id_weights` must be a floating-point tensor; got {got}")
    if id_weights.dim() != 1:
        raise ValueError(f"`id_weights` must have shape (K,); got {tuple(id_weights.shape)}")
    values = id_weights.detach().to(device="cpu", dtype=torch.float64)  # once, at construction
    if not bool((torch.isfinite(values) & (values >= 0)).all()):
        raise ValueError(f"`id_weights` must be finite and >= 0; got {values.tolist()}")


class SafetyLoss(NamedTuple):
    """What a loss function returns, always: read it by name, since fields may be added.

    Only `loss` carries a gradient. All are 0-d, float32 (float64 for float64 inputs).

    Attributes:
        loss: ce + weight * penalty, nats.
        ce: sum of the kept rows' cross-entropies over num_items, nats.
        penalty: sum of the rows' penalties over num_safety_items, squared logits for "mse".
        max_drift: the largest |z_S - r| on a row with a safety weight, logits; 0 without such rows.
    """

    loss: Tensor  # ()
    ce: Tensor  # ()
    penalty: Tensor  # ()
    max_drift: Tensor  # ()


@dataclass(frozen=True)
class RowOptions:
    """The numbers a row step needs that are the same for every row.

    Attributes:
        ignore_index: a target with this value has no cross-entropy.
        logit_scale: factor c on the raw head output.
        softcap: t in z = t tanh(c u / t), logits; 0.0 means no cap.
    """

    ignore_index: int
    logit_scale: float
    softcap: float


class LossArgs(NamedTuple):
    """Everything a loss needs beside logits or hidden states, checked and on their device.

    The ops' schemas are made from this list, so an argument is written here once. Weights are
    tensors in the accumulation dtype: no number that may change between steps is a constant.
    An inverse count is 0 where the count is 0, which makes an empty sum 0 instead of NaN.
    """

    target: Tensor  # (N,) int64
    safety_ids: Tensor  # (K,) int64
    ref: Tensor  # (N, K) after scale and cap; its row stride is 0 for one reference for all rows
    row_ce: Tensor  # (N,) c_n, exactly 0 on an ignored row
    row_safety: Tensor  # (N,) w_n
    id_weights: Tensor  # (K,) a_k
    penalty_weight: Tensor  # () lambda
    inv_items: Tensor  # () 1 / num_items
    inv_safety_items: Tensor  # () 1 / num_safety_items
    ignore_index: int
    logit_scale: float
    softcap: float  # 0.0: none
    backend: str

    @property
    def options(self) -> RowOptions:
        """Return the part that is the same for every row."""
        return RowOptions(self.ignore_index, self.logit_scale, self.softcap)

    def takes_part(self) -> Tensor:  # (N,) bool
        """Return which rows have a cross-entropy or a penalty."""
        return (self.row_ce != 0) | (self.row_safety != 0)


class RowTerms(NamedTuple):
    """What a row step found, one number per row, in the accumulation dtype.

    `ce` is 0 on an ignored row; `penalty` and `drift` are computed on every row, and it is the
    caller who leaves out those without a safety weight.
    """

    ce: Tensor  # (n,)
    penalty: Tensor  # (n,)
    drift: Tensor  # (n,) max_k |z_S_k - r_k|
    norm: Tensor  # (2, n) m = max z and log sum exp(z - m); their sum is lse


class RowStep(Protocol):
    """One pass over rows of logits: their terms, and on request their gradient.

    `logits` are raw head outputs u, before scale and cap. `safety_logits` and `ref` are after
    both; without `safety_logits` the step gathers them from `logits`. With `norm` the terms are not
    computed (backward of the logits path); it is kept in two parts because an lse of 20 in float32
    is off by 1e-6, and p_y - 1 with it. With `grad` the row gradient

        du_v = c (1 - (z_v / t)^2) * (ce_scale (p_v - [v = y]) + penalty_scale dphi/dz_v)

    is written there; it may be `logits` itself when the caller owns them. A scale of exactly 0
    means that the row does not take part, whatever it holds (inf and NaN do not leak).
    """

    def __call__(
        self,
        logits: Tensor,  # (n, V)
        target: Tensor,  # (n,) int64
        safety_ids: Tensor,  # (K,) int64
        safety_logits: Tensor | None,  # (n, K)
        ref: Tensor,  # (n, K), its row stride may be 0
        id_weights: Tensor,  # (K,)
        options: RowOptions,
        *,
        norm: Tensor | None = None,  # (2, n)
        ce_scale: Tensor | None = None,  # (n,)
        penalty_scale: Tensor | None = None,  # (n,)
        grad: Tensor | None = None,  # (n, V)
    ) -> RowTerms:
        """Compute the terms, the gradient, or both."""
        ...


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype sums are kept in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
