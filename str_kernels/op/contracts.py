"""The types shared by every layer: the options, the result and the row step's interface."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

_LARGEST = torch.finfo(torch.float32).max

IGNORE_INDEX = -100
"""The target that means "this row has no cross-entropy", as in torch's own cross_entropy."""

PenaltyKind = Literal["mse", "huber", "hinge", "centered", "logprob", "subset_kl", "coarse_kl"]
"""How a distance between safety logits is measured; docs/loss.md gives each one's formula."""

Backend = Literal["auto", "triton", "torch", "compiled", "eager"]
"""Where a loss is computed; "auto" is triton on a GPU and torch elsewhere."""

Reduction = Literal["mean", "sum", "none"]
"""`mean` divides by the counts, `sum` does not, `none` leaves one number per row."""


@dataclass(frozen=True, eq=False)
class SafetyPenalty:
    """How drift of the safety logits from the reference is penalised.

    For a row with student logits z_S and reference logits r on the K safety ids, d = z_S - r,
    weighted by a:

        mse:        penalty = 1/K sum_k a_k d_k^2                                    (STR)
        huber:      penalty = 1/K sum_k a_k huber_delta(d_k)             outliers weigh less
        hinge:      penalty = 1/K sum_k a_k max(0, -d_k)^2               only a falling logit costs
        centered:   penalty = 1/K sum_k a_k (d_k - dbar)^2, dbar the a-weighted mean of d
        logprob:    as mse with d = (z_S - logsumexp z) - r, r the reference's log-probabilities
        subset_kl:  penalty = T^2 KL(q || s), s = softmax(z_S / T), q ~ a softmax(r / T)   (PACT)
        coarse_kl:  penalty = KL over K + 1 outcomes: each safety token, or any other token;
                    r the reference's log-probabilities; docs/loss.md shows where a enters  (ours)

    The exact distance, reduction and weight of the STR paper are not known to us: `mse` with mean
    reduction is a reconstruction, and 0.1 is a provisional weight, not the paper's.

    Args:
        weight: nats per unit of the penalty (squared logits, or nats for the two KL kinds), >= 0.
            With 0 the loss is plain cross-entropy and the penalty is still reported. A float, or a
            0-d tensor that a schedule may change between steps.
        kind: one of the formulas above.
        temperature: T of "subset_kl", > 0.
        delta: |d| above which "huber" is linear, logits, > 0.
        id_weights: (K,) float >= 0 and not all 0, one factor a_k per safety id; ones when None.

    Raises:
        TypeError: `id_weights` or a tensor `weight` is not of a floating-point dtype, or a number
            is not a number.
        ValueError: `weight` or an id weight is negative or not finite, `temperature` or `delta` is
            not > 0, a shape is wrong, or `kind` is unknown.

    References:
        STR: Bach and Tran 2026, "Guardrails in Logit Space", arXiv:2604.17210. The subset's KL:
        PACT, arXiv:2603.07445.

    Examples:
        >>> SafetyPenalty(weight=0.5, kind="logprob").kind
        'logprob'
    """

    weight: float | Tensor = 0.1
    kind: PenaltyKind = "mse"
    temperature: float = 1.0
    delta: float = 1.0
    id_weights: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in get_args(PenaltyKind):
            kinds = ", ".join(get_args(PenaltyKind))
            raise ValueError(f"`kind` must be one of {kinds}; got {self.kind!r}")
        _check_weight(self.weight)
        for name in ("temperature", "delta"):
            check_number(name, getattr(self, name), positive=True)
        if self.id_weights is not None:
            check_id_weights(self.id_weights)

    def with_weight(self, weight: float | Tensor) -> SafetyPenalty:
        """Return this penalty with another weight; the two share their copies of `id_weights`."""
        _check_weight(weight)
        self.__dict__.setdefault("_copies", {})  # before the copy, so that the two share it
        changed = copy.copy(self)
        object.__setattr__(changed, "weight", weight)
        return changed

    def id_weights_on(self, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """Return `id_weights` on `device`; the copy is kept, since copying waits for the device."""
        a = self.id_weights
        if a is None or (a.device == device and a.dtype == dtype):
            return a
        if torch.compiler.is_compiling():
            return a.detach().to(device, dtype)
        # the version, because the caller may write into the tensor
        key = (device, dtype, a._version)
        copies: dict[Any, Tensor] = self.__dict__.setdefault("_copies", {})
        if key not in copies:
            copies.clear()
            copies[key] = a.detach().to(device, dtype)
        return copies[key]


def check_number(name: str, value: object, *, positive: bool = False) -> float:
    """Check a finite number: > 0 if `positive`, else >= 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number; got {type(value).__name__}")
    # not math.isfinite, which dynamo cannot trace for a symbolic number
    if not 0 <= value <= _LARGEST or (positive and value == 0):
        wide = ", which is inf in float32" if _LARGEST < value < float("inf") else ""
        rule = f"finite and {'>' if positive else '>='} 0"
        raise ValueError(f"`{name}` must be {rule}; got {value}{wide}")
    return float(value)


def check_flag(name: str, value: object, *, optional: bool = False) -> None:
    """Check for a bool, or None if `optional`."""
    if not isinstance(value, bool) and not (optional and value is None):
        wanted = "True, False or None" if optional else "True or False"
        raise TypeError(f"`{name}` must be {wanted}; got {type(value).__name__}")


def check_plain(name: str, value: Tensor) -> None:
    """Check that `value` is dense and not a DTensor."""
    if hasattr(value, "placements"):  # a DTensor's shape is global, its memory only a part
        raise ValueError(
            f"`{name}` must be a plain tensor; got a DTensor placed as {value.placements}: "
            "gather it first (full_tensor())"
        )
    if value.layout != torch.strided:
        raise ValueError(f"`{name}` must be a dense tensor; got layout {value.layout}")


def _check_weight(weight: float | Tensor) -> None:
    if isinstance(weight, Tensor):
        if not weight.is_floating_point():
            raise TypeError(f"`weight` must be a floating-point tensor; got {weight.dtype}")
        if weight.dim() != 0:
            raise ValueError(f"`weight` must be a 0-d tensor; got shape {tuple(weight.shape)}")
        check_plain("weight", weight)
        return  # reading its value would wait for the device
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError(f"`weight` must be a number or a 0-d tensor; got {type(weight).__name__}")
    check_number("weight", weight)


def check_id_weights(id_weights: Tensor) -> None:
    """Check per-id factors: (K,), floating point, finite, >= 0 and not all 0."""
    if not isinstance(id_weights, Tensor) or not id_weights.is_floating_point():
        got = getattr(id_weights, "dtype", type(id_weights).__name__)
        raise TypeError(f"`id_weights` must be a floating-point tensor; got {got}")
    if id_weights.dim() != 1:
        raise ValueError(f"`id_weights` must have shape (K,); got {tuple(id_weights.shape)}")
    check_plain("id_weights", id_weights)
    if id_weights.is_meta:
        raise ValueError("`id_weights` must hold values; got a tensor on device meta")
    values = id_weights.detach().to(device="cpu", dtype=torch.float64)  # once, at construction
    if not bool((torch.isfinite(values) & (values >= 0)).all()):
        raise ValueError(f"`id_weights` must be finite and >= 0; got {values.tolist()}")
    if values.numel() and not bool(values.any()):
        raise ValueError(f"`id_weights` must not all be 0; got {values.tolist()}")


class SafetyLoss(NamedTuple):
    """What every loss function returns. Access fields by name, since more may be added.

    Only `loss` carries a gradient. All are 0-d, or (N,) with reduction "none", and float32 (float64
    for float64 inputs).

    Attributes:
        loss: ce + z-loss + weight * penalty, nats.
        ce: sum of the kept rows' (smoothed) cross-entropies over num_items, nats.
        penalty: sum of the rows' penalties over num_safety_items, in the kind's unit.
        max_drift: the largest |z_S - r| on a row with a safety weight, logits; 0 without such rows.
        token_accuracy: with `metrics`, the number of kept rows whose largest logit is the target's,
            over num_items; else None.
        entropy: with `metrics`, the kept rows' entropies of softmax(z), over num_items, nats; else
            None.
    """

    loss: Tensor  # () or (N,), as all of them
    ce: Tensor
    penalty: Tensor
    max_drift: Tensor
    token_accuracy: Tensor | None = None
    entropy: Tensor | None = None

    def detach(self) -> SafetyLoss:
        """Return the same terms without the graph behind them, to keep or to log."""
        return SafetyLoss._make(term if term is None else term.detach() for term in self)


@dataclass(frozen=True, eq=False)
class RowNumbers:
    """The numbers of a loss that are the same for every row, as the caller passes them.

    `safety_cross_entropy` documents them.
    """

    ignore_index: int = IGNORE_INDEX
    logit_scale: float = 1.0
    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss_weight: float = 0.0
    metrics: bool = False

    def check_numbers(self) -> None:
        """Check the type and range of each number."""
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int):
            raise TypeError(
                f"`ignore_index` must be an int; got {type(self.ignore_index).__name__}"
            )
        if not -(2**63) <= self.ignore_index < 2**63:
            raise ValueError(f"`ignore_index` must fit in int64; got {self.ignore_index}")
        check_number("logit_scale", self.logit_scale, positive=True)
        if self.softcap is not None:
            check_number("softcap", self.softcap, positive=True)
        if check_number("label_smoothing", self.label_smoothing) >= 1:
            raise ValueError(f"`label_smoothing` must be in [0, 1); got {self.label_smoothing}")
        check_number("z_loss_weight", self.z_loss_weight)
        check_flag("metrics", self.metrics)


@dataclass(frozen=True)
class RowOptions(RowNumbers):
    """The options of a row step that are the same for every row, the penalty's included.

    Attributes:
        softcap: t in z = t tanh(c u / t), logits; 0.0 means no cap, since a kernel takes no None.
        kind: the penalty's PenaltyKind.
        temperature: T of "subset_kl".
        delta: of "huber".
    """

    softcap: float = 0.0
    kind: str = "mse"
    temperature: float = 1.0
    delta: float = 1.0


class LossArgs(NamedTuple):
    """Everything a loss needs besides logits or hidden states, checked and on their device.

    The ops' schemas are generated from these fields and those of RowOptions. Weights are tensors in
    the accumulation dtype, so that changing one between steps does not recompile. An inverse count
    is 0 if the count is 0, which makes an empty sum 0 instead of NaN.
    """

    target: Tensor  # (N,) int64
    safety_ids: Tensor  # (K,) int64
    ref: Tensor  # (N, K) after scale and cap; row stride 0 if all rows share one reference
    row_ce: Tensor  # (N,) c_n, exactly 0 on an ignored row
    row_safety: Tensor  # (N,) w_n
    id_weights: Tensor  # (K,) a_k
    penalty_weight: Tensor  # () lambda
    inv_items: Tensor  # () 1 / num_items
    inv_safety_items: Tensor  # () 1 / num_safety_items
    reduce: bool  # False: reduction "none"
    backend: str
    group_name: str  # the process group of a vocabulary-parallel head; "": none
    shard_sizes: list[int]  # each rank's number of vocabulary rows
    options: RowOptions  # last, because an op takes its fields one by one

    def flat(self) -> tuple[Any, ...]:
        """Return the arguments of an op: tensors first, the options' numbers at the end."""
        *rest, options = self
        return (*rest, *(getattr(options, name) for name in ROW_OPTIONS))

    @classmethod
    def from_flat(cls, values: Sequence[Any]) -> LossArgs:
        """Invert `flat`."""
        place = len(values) - len(ROW_OPTIONS)
        return cls._make((*values[:place], RowOptions(*values[place:])))

    def takes_part(self) -> Tensor:  # (N,) bool
        """Return which rows have a cross-entropy or a penalty."""
        return (self.row_ce != 0) | (self.row_safety != 0)


ROW_OPTIONS = tuple(one.name for one in fields(RowOptions))
"""Names of the fields, in the order in which an op takes them."""


class RowTerms(NamedTuple):
    """The results of a row step, one number per row, in the accumulation dtype.

    `ce` is 0 on an ignored row. The others are computed on every row; the caller leaves out rows
    without a weight. A step that is given `norm` computes none of them.
    """

    ce: Tensor  # (n,)
    penalty: Tensor  # (n,)
    drift: Tensor  # (n,) max_k |z_S_k - r_k|
    norm: Tensor  # (2, n) m = max z and log sum exp(z - m); their sum is lse
    right: Tensor  # (n,) 1.0 where the target is the first largest logit; empty without metrics
    entropy: Tensor  # (n,) of softmax(z), nats; empty without metrics


class RowStep(Protocol):
    """One pass over rows of logits: their terms, and on request their gradient.

    `logits` are raw head outputs u, before scale and cap. `safety_logits` and `ref` are after
    both; without `safety_logits` the step gathers them from `logits`. With `norm` the terms are not
    computed (backward of the logits path). `norm` has two parts because lse itself, rounded to
    float32, is off by 1e-6 at a value of 20, and so would p_y - 1 be. With `grad` the step writes
    to it the gradient, with respect to u, of

        ce_scale (ce + zeta lse^2) + penalty_scale phi

    (derived in docs/loss.md). `grad` may be `logits` itself if the caller owns them. A row with a
    scale of exactly 0 contributes nothing, even if it holds inf or NaN. `padded` says that each
    row of `logits` and `grad` is followed, up to a multiple of 16 elements, by memory that the
    step may read and set to 0.
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
        padded: bool = False,
    ) -> RowTerms:
        """Compute the terms, the gradient, or both."""
        ...


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)
