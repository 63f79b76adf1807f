"""The public functions: the loss computed from logits, or from hidden states and the head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import autograd
from .checks import (
    check_chunk_bytes,
    check_float,
    check_head,
    check_low_rank,
    check_tensor,
)
from .chunks import row_bytes, rows_per_chunk
from .contracts import IGNORE_INDEX, SafetyLoss, SafetyPenalty, check_flag
from .eager import eager_cross_entropy, eager_linear_cross_entropy
from .loss_args import DEFAULT_PENALTY, LossOptions, make_loss_args
from .parallel import VocabShard
from .projection import Head, cast_for_autocast, local_head, project_head

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def safety_cross_entropy(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N,)
    safety_ids: Tensor | None = None,  # (K,)
    ref_safety_logits: Tensor | None = None,  # (N, K) or (K,)
    *,
    penalty: SafetyPenalty = DEFAULT_PENALTY,
    safety_row_weight: Tensor | None = None,  # (N,)
    ce_row_weight: Tensor | None = None,  # (N,)
    num_items: float | Tensor | None = None,
    num_safety_items: float | Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    metrics: bool = False,
    inplace: bool = False,
    backend: str = "auto",
) -> SafetyLoss:
    """Cross-entropy plus a penalty on how far the safety logits moved from a reference model.

    For row n with raw logits u, target y, reference logits r and the K safety ids S:

        z       = softcap tanh(logit_scale u / softcap)         (no cap: z = logit_scale u)
        lse     = logsumexp(z)
        ce      = (1 - e) (lse - z[y]) + e (lse - mean(z))      e = label_smoothing
        penalty = phi(z[S], r, a)                               SafetyPenalty lists the kinds
        loss    = sum_n c_n (ce_n + z_loss_weight lse_n^2) / num_items
                + weight sum_n w_n penalty_n / num_safety_items

    Args:
        logits: (N, V) float32, bfloat16, float16 or float64. Row n predicts target[n]: shift the
            labels before the call.
        target: (N,) int64, each in [0, V) or equal to ignore_index.
        safety_ids: (K,) int64, distinct, each in [0, V). None, or K = 0: plain cross-entropy.
        ref_safety_logits: (N, K), or (K,) to use one row for all; any float dtype, after the
            reference model's own scale and cap. Column k belongs to safety_ids[k]. Gets no
            gradient. Penalty kinds "logprob" and "coarse_kl" expect log-probabilities here, as
            `safety_log_probs` returns them.
        penalty: kind, weight and per-id weights a.
        safety_row_weight: (N,) float w >= 0; when None, 1 on rows with a target and 0 on ignored
            rows. An ignored row may have a weight, and then has a penalty.
        ce_row_weight: (N,) float c; ones when None.
        num_items: divisor of the cross-entropy; when None, the number of rows not ignored. With
            gradient accumulation or several ranks, pass the count over all of them.
        num_safety_items: divisor of the penalty; the sum of w when None.
        ignore_index: a row with this target has no cross-entropy.
        reduction: "mean" as above; "sum" sets both divisors to 1; "none" does that too and
            returns (N,) terms, the loss with its gradient.
        label_smoothing: share of the target spread evenly over the vocabulary, in [0, 1).
        z_loss_weight: weight of lse^2, >= 0; part of `loss` and not of `ce`.
        logit_scale: factor c on the logits, > 0.
        softcap: t in logits, > 0, or None.
        metrics: also compute token_accuracy (the first largest logit is the target's) and entropy,
            in the same pass, over the rows that have a cross-entropy (a target, and c not 0).
        inplace: let backward overwrite `logits` with their gradient, which saves N V elements.
            The forward never changes them; a second backward raises. Use it for logits that a
            model computed: a leaf tensor would share its memory with its own gradient.
        backend: "auto" (triton on a GPU, else torch), "triton", "torch", "eager" (the plain
            definition) or "compiled" (torch through torch.compile: faster on a CPU with softcap,
            smoothing or metrics; needs a C++ compiler and some seconds for the first call). The
            Triton kernels have not run on a GPU yet; `str-kernels doctor` checks them in seconds.

    Returns:
        SafetyLoss with 0-d float32 tensors (float64 for float64 logits; (N,) with reduction
        "none"): loss and ce in nats, penalty in the kind's unit, max_drift in logits. Only `loss`
        has a gradient.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, device, value or name is wrong. On a GPU the values of labels and ids
            are not checked, since that would wait for the device: a bad label makes its row's loss
            and gradient NaN, and the ids must be valid, as those of a SafetyTokens are.

    Notes:
        Sums are kept in float32. A second derivative raises, except with backend="eager".
        If every row is ignored, the loss and its gradient are 0.

    References:
        Loss: Bach and Tran 2026, arXiv:2604.17210 (a reconstruction, see docs/loss.md). One-pass
        logsumexp: Milakov and Gimelshein 2018, arXiv:1805.02867. z-loss: PaLM, arXiv:2204.02311.

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
    check_flag("inplace", inplace)
    options = LossOptions(
        penalty=penalty,
        safety_row_weight=safety_row_weight,
        ce_row_weight=ce_row_weight,
        num_items=num_items,
        num_safety_items=num_safety_items,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss_weight=z_loss_weight,
        logit_scale=logit_scale,
        softcap=softcap,
        metrics=metrics,
        backend=backend,
    )
    args = make_loss_args(logits, target, safety_ids, ref_safety_logits, options)
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
    low_rank: tuple[Tensor, Tensor] | None = None,  # (N, r), (V, r)
    penalty: SafetyPenalty = DEFAULT_PENALTY,
    safety_row_weight: Tensor | None = None,  # (N,)
    ce_row_weight: Tensor | None = None,  # (N,)
    num_items: float | Tensor | None = None,
    num_safety_items: float | Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    metrics: bool = False,
    pack_rows: bool | None = None,
    chunk_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> SafetyLoss:
    """Compute `safety_cross_entropy(hidden @ linear_weight.T + linear_bias, ...)` without logits.

    The logits are computed for one chunk of rows at a time, and their gradient overwrites them, so
    no tensor of size (N, V) exists. The safety logits are computed separately in float32 by
    `project`. Compute the reference's in the same way: equal hidden states then give a penalty
    of exactly 0.0.

    Args:
        hidden: (N, D) float32, bfloat16, float16 or float64, the state before the head.
        linear_weight: (V, D), the head, of the same dtype. Its gradient is summed in float32 over
            the chunks; a frozen head gets none.
        target: (N,) int64, each in [0, V) or equal to ignore_index.
        safety_ids: (K,) int64, distinct, each in [0, V). None, or K = 0: plain cross-entropy.
        ref_safety_logits: (N, K) or (K,), best computed by `project`; gets no gradient.
        linear_bias: (V,) of the same dtype, or None.
        low_rank: (t, B) of a LoRA on the head, of the same dtype: t (N, r) = scaling * A(hidden),
            computed by the caller under autograd, and B (V, r). Adds t B^T to the logits without
            merging the weights.
        penalty: as in `safety_cross_entropy`.
        safety_row_weight: as in `safety_cross_entropy`.
        ce_row_weight: as in `safety_cross_entropy`.
        num_items: as in `safety_cross_entropy`.
        num_safety_items: as in `safety_cross_entropy`.
        ignore_index: as in `safety_cross_entropy`.
        reduction: as in `safety_cross_entropy`; "none" recomputes the logits in backward, which
            costs a third matrix product.
        label_smoothing: as in `safety_cross_entropy`.
        z_loss_weight: as in `safety_cross_entropy`.
        logit_scale: as in `safety_cross_entropy`.
        softcap: as in `safety_cross_entropy`.
        metrics: as in `safety_cross_entropy`.
        pack_rows: leave rows with neither a cross-entropy nor a penalty out of the matrix
            products. True: always, which waits for a GPU once; False: never; None: on a CPU only.
        chunk_bytes: memory for one chunk's logits, bytes, at least one row's; None picks a size for
            the device. The result does not depend on it beyond rounding.
        process_group: the ranks that share a vocabulary-parallel head. Each rank passes its own
            consecutive rows of linear_weight, linear_bias and B, in the order of the ranks; the
            numbers of rows may differ, and V is their sum. All else is the same on every rank:
            targets and ids refer to the whole vocabulary. Not needed if linear_weight is a DTensor
            placed Shard(0) on a one-dimensional mesh.
        backend: as in `safety_cross_entropy`; with a process group "auto" is "torch", and the
            others are refused.

    Returns:
        SafetyLoss, as `safety_cross_entropy`; with a process group, bitwise equal on all ranks.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, device, value or name is wrong.

    Notes:
        The gradient is computed in the forward pass, so backward only multiplies. Under autocast
        the operands are rounded to autocast's dtype, as in the head's own matrix product.
        With a process group of p ranks, the gradient of `hidden` (and of t) is summed over them in
        float32; each rank keeps the gradients of its part of the head. For each row the ranks
        gather 3 p numbers of 4 bytes (4 p with smoothing, 2 p more with metrics) and sum K + D
        (+ r). If linear_weight is a plain tensor, they also exchange the sizes of their parts,
        once for each such tensor.

    References:
        Bach and Tran 2026, arXiv:2604.17210.

    Examples:
        >>> hidden = torch.ones(3, 4, requires_grad=True)
        >>> terms = safety_linear_cross_entropy(hidden, torch.zeros(7, 4), torch.tensor([0, 6, 1]))
        >>> round(float(terms.ce), 4)
        1.9459
    """
    hidden, head, shard, widest = _checked_head(
        hidden, linear_weight, linear_bias, low_rank, chunk_bytes, process_group
    )
    check_flag("pack_rows", pack_rows, optional=True)
    options = LossOptions(
        penalty=penalty,
        safety_row_weight=safety_row_weight,
        ce_row_weight=ce_row_weight,
        num_items=num_items,
        num_safety_items=num_safety_items,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss_weight=z_loss_weight,
        logit_scale=logit_scale,
        softcap=softcap,
        metrics=metrics,
        backend=backend,
    )
    args = make_loss_args(hidden, target, safety_ids, ref_safety_logits, options, shard)
    if args.backend == "eager":
        return eager_linear_cross_entropy(hidden, head, args)
    pack = hidden.device.type == "cpu" if pack_rows is None else pack_rows
    train_head = torch.is_grad_enabled() and linear_weight.requires_grad
    chunk_rows = rows_per_chunk(hidden, widest, chunk_bytes, train_head)
    return autograd.linear_cross_entropy(hidden, head, args, chunk_rows, pack)


def safety_log_probs(
    hidden: Tensor,  # (N, D)
    linear_weight: Tensor,  # (V, D)
    safety_ids: Tensor,  # (K,)
    *,
    linear_bias: Tensor | None = None,  # (V,)
    low_rank: tuple[Tensor, Tensor] | None = None,  # (N, r), (V, r)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:  # (N, K)
    """Compute the reference log-probabilities for penalty kinds "logprob" and "coarse_kl".

        z_S - logsumexp(z)

    Args:
        hidden: (N, D), the frozen model's state before the head.
        linear_weight: (V, D), its head.
        safety_ids: (K,) int64, distinct, each in [0, V).
        linear_bias: as in `safety_linear_cross_entropy`.
        low_rank: as in `safety_linear_cross_entropy`.
        logit_scale: as in `safety_linear_cross_entropy`.
        softcap: as in `safety_linear_cross_entropy`.
        chunk_bytes: as in `safety_linear_cross_entropy`.
        process_group: as in `safety_linear_cross_entropy`.
        backend: as in `safety_linear_cross_entropy`.

    Returns:
        (N, K) float32 (float64 for float64 inputs), nats, without a gradient.

    Notes:
        Computes all logits, a chunk of rows at a time: memory as in the loss. The log-normaliser is
        equal to the loss's if the same rows are in the same chunks. Otherwise the rounding of the
        matrix product may differ, and the penalty before the first step is not 0 but the square of
        that rounding.

    Examples:
        >>> ids = torch.tensor([0, 2])
        >>> safety_log_probs(torch.ones(1, 4), torch.zeros(8, 4), ids)[0, 0].exp().item()
        0.125
    """
    hidden, head, shard, widest = _checked_head(
        hidden, linear_weight, linear_bias, low_rank, chunk_bytes, process_group
    )
    check_tensor("safety_ids", safety_ids, ("K",))
    options = LossOptions(
        penalty=SafetyPenalty(kind="logprob"),  # logits are computed as for such a loss
        logit_scale=logit_scale,
        softcap=softcap,
        backend=backend,
    )
    with torch.no_grad():
        target = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
        ref = hidden.new_zeros(safety_ids.shape[0])  # unused: only lse is needed
        args = make_loss_args(hidden, target, safety_ids, ref, options, shard)
        if args.backend == "eager":
            args = args._replace(backend="torch")  # one pass over the same rows
        chunk_rows = rows_per_chunk(hidden, widest, chunk_bytes)
        lse = autograd.log_normalizer(hidden, head, args, chunk_rows)
        made = args.options
        z_s = project_head(hidden, head, safety_ids, made.logit_scale, made.softcap, shard)
        return z_s - lse.unsqueeze(1)


def _checked_head(
    hidden: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    low_rank: tuple[Tensor, Tensor] | None,
    chunk_bytes: int | None,
    process_group: ProcessGroup | None,
) -> tuple[Tensor, Head, VocabShard | None, int]:
    """Check the operands of the head's products, and cast them as autocast would.

    Returns also the largest V of any rank: all ranks must use the same chunks of rows.
    """
    head = Head(linear_weight, linear_bias, *check_low_rank(low_rank))
    head, shard = local_head(head, process_group)
    check_head(hidden, head)
    widest = head.weight.shape[0] if shard is None else max(shard.sizes) + 1
    hidden, head = cast_for_autocast(hidden, head)
    names = ("linear_weight", "linear_bias", "low_rank", "low_rank")
    for name, value in zip(names, head, strict=True):
        if value is not None:
            check_float(name, value, like=hidden.dtype, of="hidden")
    check_chunk_bytes(chunk_bytes, row_bytes(hidden, widest))
    return hidden, head, shard, widest
