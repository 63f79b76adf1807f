"""The two functions: the loss from logits, and from hidden states and the head."""

from __future__ import annotations

import torch
from torch import Tensor

from . import autograd
from .backends import choose_backend
from .checks import (
    check_chunk_bytes,
    check_count,
    check_device,
    check_float,
    check_options,
    check_row_weight,
    check_rows,
    check_tensor,
)
from .contracts import (
    IGNORE_INDEX,
    LossArgs,
    SafetyLoss,
    SafetyPenalty,
    accumulation_dtype,
)
from .eager import eager_cross_entropy, eager_linear_cross_entropy
from .projection import cast_for_autocast

_DEFAULT_PENALTY = SafetyPenalty()


def safety_cross_entropy(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N,)
    safety_ids: Tensor | None = None,  # (K,)
    ref_safety_logits: Tensor | None = None,  # (N, K) or (K,)
    *,
    penalty: SafetyPenalty = _DEFAULT_PENALTY,
    safety_row_weight: Tensor | None = None,  # (N,)
    ce_row_weight: Tensor | None = None,  # (N,)
    num_items: float | Tensor | None = None,
    num_safety_items: float | Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    inplace: bool = False,
    backend: str = "auto",
) -> SafetyLoss:
    """Cross-entropy plus a penalty on how far the safety logits moved from a reference model.

    For row n with raw logits u, target y, reference logits r and the K safety ids S:

        z       = softcap tanh(logit_scale u / softcap)         (no cap: z = logit_scale u)
        ce      = logsumexp(z) - z[y]
        penalty = 1/K sum_k a_k (z[S_k] - r_k)^2
        loss    = sum_n c_n ce_n / num_items + weight sum_n w_n penalty_n / num_safety_items

    Args:
        logits: (N, V) float32, bfloat16, float16 or float64. Row n predicts target[n]: shift
            before the call.
        target: (N,) int64, each in [0, V) or equal to ignore_index.
        safety_ids: (K,) int64, distinct, each in [0, V). None, or K = 0: plain cross-entropy.
        ref_safety_logits: (N, K), or (K,) for all rows, any float dtype, after the reference
            model's own scale and cap; takes no gradient. Column k belongs to safety_ids[k].
        penalty: kind, weight (nats per squared logit) and per-id weights a.
        safety_row_weight: (N,) float w >= 0; 1 on rows with a target and 0 on ignored ones when
            None. Independent of the targets: an ignored row may carry a penalty.
        ce_row_weight: (N,) float c; ones when None.
        num_items: divisor of the cross-entropy; the number of rows not ignored when None. Pass
            the count over all accumulation steps and ranks when training with either.
        num_safety_items: divisor of the penalty; the sum of w when None.
        ignore_index: a row with this target has no cross-entropy.
        reduction: "mean" as above; "sum" sets both divisors to 1.
        logit_scale: factor c on the logits, > 0.
        softcap: t in logits, > 0, or None.
        inplace: let backward overwrite `logits` with their gradient, which saves N V elements.
            The forward never changes them; a second backward then raises.
        backend: "triton", "torch", "eager", or "auto" (triton on a GPU, else torch).

    Returns:
        SafetyLoss with 0-d float32 tensors (float64 for float64 logits): loss and ce in nats,
        penalty in squared logits, max_drift in logits. Only `loss` has a gradient.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, device, value or name is wrong. On a GPU labels and ids are not read
            (no wait for the device): a bad label makes its row's loss and gradient NaN, and ids
            must be valid, as those of a SafetyTokens are.

    Notes:
        Sums are kept in float32. A second derivative raises, except with backend="eager".
        Where every row is ignored the loss is 0 and so is the gradient.

    References:
        Loss: Bach and Tran 2026, arXiv:2604.17210 (a reconstruction, see docs/loss.md). One-pass
        logsumexp: Milakov and Gimelshein 2018, arXiv:1805.02867.

    Examples:
        >>> logits = torch.zeros(2, 5, requires_grad=True)
        >>> terms = safety_cross_entropy(
        ...     logits, torch.tensor([1, 2]), torch.tensor([0, 4]), torch.ones(2, 2)
        ... )
        >>> terms.loss.backward()
        >>> round(float(terms.ce), 4), float(terms.penalty)
        (1.6094, 1.0)
    """
    check_tensor("logits", logits, ("N", "V"))
    check_float("logits", logits)
    args = _loss_args(
        logits,
        target,
        safety_ids,
        ref_safety_logits,
        penalty=penalty,
        safety_row_weight=safety_row_weight,
        ce_row_weight=ce_row_weight,
        num_items=num_items,
        num_safety_items=num_safety_items,
        ignore_index=ignore_index,
        reduction=reduction,
        logit_scale=logit_scale,
        softcap=softcap,
        backend=backend,
    )
    if args.backend == "eager":
        return eager_cross_entropy(logits, args)
    return autograd.cross_entropy(logits, args, inplace)


def safety_linear_cross_entropy(
    hidden: Tensor,  # (N, D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    safety_ids: Tensor | None = None,  # (K,)
    ref_safety_logits: Tensor | None = None,  # (N, K) or (K,)
    *,
    linear_bias: Tensor | None = None,  # (V,)
    penalty: SafetyPenalty = _DEFAULT_PENALTY,
    safety_row_weight: Tensor | None = None,  # (N,)
    ce_row_weight: Tensor | None = None,  # (N,)
    num_items: float | Tensor | None = None,
    num_safety_items: float | Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> SafetyLoss:
    """Compute `safety_cross_entropy(hidden @ linear_weight.T + linear_bias, ...)` without logits.

    The head's product is made for a chunk of rows at a time and its memory used again for the
    gradient, so nothing of size (N, V) exists. The safety logits are a product of their own in
    float32 (`project`), as the reference's should be: equal hidden states then give a penalty of
    exactly 0.0.

    Args:
        hidden: (N, D) float32, bfloat16, float16 or float64, the state before the head.
        linear_weight: (V, D), the head, of the same dtype. No gradient is made for it if it is
            frozen; else it is summed in float32 over the chunks.
        target: (N,) int64, each in [0, V) or equal to ignore_index.
        safety_ids: (K,) int64, distinct, each in [0, V). None, or K = 0: plain cross-entropy.
        ref_safety_logits: (N, K) or (K,), best made by `project`; takes no gradient.
        linear_bias: (V,) of the same dtype, or None.
        penalty: as in `safety_cross_entropy`.
        safety_row_weight: as in `safety_cross_entropy`.
        ce_row_weight: as in `safety_cross_entropy`.
        num_items: as in `safety_cross_entropy`.
        num_safety_items: as in `safety_cross_entropy`.
        ignore_index: as in `safety_cross_entropy`.
        reduction: as in `safety_cross_entropy`.
        logit_scale: as in `safety_cross_entropy`.
        softcap: as in `safety_cross_entropy`.
        chunk_bytes: memory for one chunk's logits, bytes; None picks a size for the device. The
            result does not depend on it beyond rounding.
        backend: as in `safety_cross_entropy`.

    Returns:
        SafetyLoss, as `safety_cross_entropy`.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, device, value or name is wrong.

    Notes:
        The gradient is made in the forward, so backward only multiplies. Under autocast the
        operands are rounded to autocast's dtype, as in the head's own product.

    References:
        Bach and Tran 2026, arXiv:2604.17210.

    Examples:
        >>> hidden = torch.ones(3, 4, requires_grad=True)
        >>> terms = safety_linear_cross_entropy(hidden, torch.zeros(7, 4), torch.tensor([0, 6, 1]))
        >>> round(float(terms.ce), 4)
        1.9459
    """
    check_tensor("hidden", hidden, ("N", "D"))
    check_tensor("linear_weight", linear_weight, ("V", hidden.shape[1]))
    check_float("hidden", hidden)
    check_float("linear_weight", linear_weight)
    check_device("linear_weight", linear_weight, hidden.device)
    if linear_bias is not None:
        check_tensor("linear_bias", linear_bias, (linear_weight.shape[0],))
        check_float("linear_bias", linear_bias)
        check_device("linear_bias", linear_bias, hidden.device)
    check_chunk_bytes(chunk_bytes)
    hidden, linear_weight, linear_bias = cast_for_autocast(hidden, linear_weight, linear_bias)
    check_float("linear_weight", linear_weight, like=hidden.dtype)
    if linear_bias is not None:
        check_float("linear_bias", linear_bias, like=hidden.dtype)
    args = _loss_args(
        hidden,
        target,
        safety_ids,
        ref_safety_logits,
        penalty=penalty,
        safety_row_weight=safety_row_weight,
        ce_row_weight=ce_row_weight,
        num_items=num_items,
        num_safety_items=num_safety_items,
        ignore_index=ignore_index,
        reduction=reduction,
        logit_scale=logit_scale,
        softcap=softcap,
        backend=backend,
    )
    if args.backend == "eager":
        return eager_linear_cross_entropy(hidden, linear_weight, linear_bias, args)
    return autograd.linear_cross_entropy(hidden, linear_weight, linear_bias, args, chunk_bytes)


def _loss_args(
    like: Tensor,  # (N, ...) logits or hidden states
    target: Tensor,
    safety_ids: Tensor | None,
    ref: Tensor | None,
    *,
    penalty: SafetyPenalty,
    safety_row_weight: Tensor | None,
    ce_row_weight: Tensor | None,
    num_items: float | Tensor | None,
    num_safety_items: float | Tensor | None,
    ignore_index: int,
    reduction: str,
    logit_scale: float,
    softcap: float | None,
    backend: str,
) -> LossArgs:
    """Check what both functions share and turn every default into a tensor."""
    check_options(
        reduction=reduction, logit_scale=logit_scale, softcap=softcap, ignore_index=ignore_index
    )
    check_rows(target, safety_ids, ref, like)
    check_row_weight("safety_row_weight", safety_row_weight, like)
    check_row_weight("ce_row_weight", ce_row_weight, like)
    check_count("num_items", num_items, like.device)
    check_count("num_safety_items", num_safety_items, like.device)
    if not isinstance(penalty, SafetyPenalty):
        raise TypeError(f"`penalty` must be a SafetyPenalty; got {type(penalty).__name__}")
    dtype = accumulation_dtype(like.dtype)
    rows = like.shape[0]
    if safety_ids is None or ref is None:
        safety_ids = target.new_empty(0)
        ref = like.new_empty((rows, 0), dtype=dtype)
    ids = safety_ids.shape[0]
    id_weights = penalty.id_weights
    if id_weights is None:
        id_weights = like.new_ones(ids, dtype=dtype)
    elif id_weights.shape[0] != ids:
        raise ValueError(
            f"`id_weights` must have shape ({ids},), one per safety id; "
            f"got {tuple(id_weights.shape)}"
        )

    kept = (target != ignore_index).to(dtype)
    row_ce = kept
    if ce_row_weight is not None:
        row_ce = torch.where(kept != 0, ce_row_weight.detach().to(dtype), 0.0)
    row_safety = kept if safety_row_weight is None else safety_row_weight.detach().to(dtype)
    if reduction == "sum":
        num_items = num_safety_items = 1.0
    items = kept.sum() if num_items is None else _scalar(num_items, like, dtype)
    safety_items = (
        row_safety.sum() if num_safety_items is None else _scalar(num_safety_items, like, dtype)
    )
    return LossArgs(
        target=target,
        safety_ids=safety_ids,
        ref=ref.detach().to(dtype).expand(rows, ids),
        row_ce=row_ce,
        row_safety=row_safety,
        id_weights=id_weights.detach().to(like.device, dtype),
        penalty_weight=_scalar(penalty.weight, like, dtype),
        inv_items=_inverse(items),
        inv_safety_items=_inverse(safety_items),
        ignore_index=ignore_index,
        logit_scale=float(logit_scale),
        softcap=float(softcap or 0.0),
        backend=choose_backend(backend, like.device, like.dtype),
    )


def _scalar(value: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(like.device, dtype)
    return torch.full((), value, dtype=dtype, device=like.device)


def _inverse(count: Tensor) -> Tensor:
    """Return 1 / count, and 0 for 0: an empty sum divided by nothing is 0."""
    return torch.where(count > 0, count.reciprocal(), 0.0)
