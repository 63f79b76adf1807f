"""The row step by Triton: the launcher and its block sizes; the kernel is in `row_kernel`.

Traffic per row: 2 reads and 1 write of V logits with a gradient, 1 read without; where the row fits
one program (or, for `row_step_cluster`, a cluster of thread blocks) 1 read and 1 write.

No kernel has run on a GPU yet: they are tested in Triton's interpreter and compiled.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .contracts import RowOptions, RowTerms
from .penalties import ON_LOG_PROBS
from .row_kernel import row_step_kernel, scatter_kernel

# A block is what a program holds in registers at a time, in float32 while it works on it: 16 logits
# per thread, or 8 where the options of the loss ask for more numbers beside each. A row held whole
# takes up to all 1,024 threads, with 64 registers each: 64 bytes of it per thread, and fewer where
# those do not fit. The numbers come from `python -m bench compile`: with them nothing spills.
_THREADS = 256  # small programs let several rows share a multiprocessor
_MAX_THREADS = 1024
_PER_THREAD = 16
_PER_THREAD_BUSY = 8
_HELD_BYTES = 64  # of a row in the registers of one thread
_MAX_CTAS = 8  # the largest cluster that every GPU with clusters can run
THREADS_PER_WARP = 64 if torch.version.hip else 32
# Left to itself ptxas spills a few bytes to need fewer registers than that, for more programs at a
# time; 1,024 threads have no more anyway, and told so it spills where it did not.
CAPS_REGISTERS = bool(torch.version.cuda)
_MAX_REGISTERS = 64
# AMD's compiler moves a load past a barrier to where its value is used, which may be after another
# warp has overwritten it; not past one that a store of what was made of it precedes.
BARRIERS_HOLD_LOADS = not torch.version.hip


class Launch(NamedTuple):
    """The sizes of one launch; ON_CHIP: the row is read once and held."""

    BLOCK_V: int
    BLOCK_K: int
    ON_CHIP: bool
    num_warps: int
    num_ctas: int


def launch_sizes(
    vocab: int,
    ids: int,
    itemsize: int,
    options: RowOptions,
    *,
    one_launch: bool,
    padded: bool = False,
    cluster: bool = False,
) -> Launch:
    """Return the sizes for a vocabulary, a number of safety ids and the logits' bytes each.

    Args:
        vocab: V.
        ids: K.
        itemsize: bytes of a logit.
        options: some need more registers per logit.
        one_launch: whether terms and gradient are made together, so that holding the row pays.
        padded: as in `contracts.RowStep`.
        cluster: whether the row may be spread over a thread-block cluster.

    Raises:
        ValueError: a cluster was asked for and the row fits none.
    """
    block_k = max(16, triton.next_power_of_2(ids))
    whole = max(128, triton.next_power_of_2(vocab))
    per_thread = _PER_THREAD_BUSY if _is_busy(options) else _PER_THREAD
    # By the thread, of a row: two masks of an odd one, and a divergence beside it, take room too.
    tight = (padded and vocab % 16 != 0) + (cluster and options.kind == "subset_kl")
    held = (_HELD_BYTES // itemsize, _PER_THREAD, _PER_THREAD_BUSY)[tight]
    if _is_busy(options):
        held = _PER_THREAD_BUSY
    per_thread = min(per_thread, held)
    held *= _MAX_THREADS
    ctas = -(-whole // held)
    if one_launch and (ctas == 1 or cluster):
        if ctas > _MAX_CTAS:
            raise ValueError(
                "`backend` must be one that can hold a row: with these options 'triton_cluster' "
                f"holds {_MAX_CTAS * held} logits of {itemsize} bytes; got V = {vocab}"
            )
        return Launch(whole, block_k, True, _warps(whole // ctas // per_thread), ctas)
    threads = min(_MAX_THREADS, max(_THREADS, block_k // 2))
    block_v = min(threads * per_thread, whole)
    return Launch(block_v, block_k, False, _warps(block_v // per_thread), 1)


def _is_busy(options: RowOptions) -> bool:
    return bool(
        options.softcap
        or options.label_smoothing
        or options.z_loss_weight
        or options.metrics
        or options.kind in ON_LOG_PROBS
    )


def _keywords(sizes: Launch) -> dict[str, int | bool]:
    """Return the sizes as the launch takes them."""
    keywords: dict[str, int | bool] = sizes._asdict()
    if sizes.num_ctas == 1:
        del keywords["num_ctas"]
    if CAPS_REGISTERS and sizes.num_warps * THREADS_PER_WARP < _MAX_THREADS:
        keywords["maxnreg"] = _MAX_REGISTERS
    return keywords


def _warps(threads: int) -> int:
    return max(4, min(threads, _MAX_THREADS) // THREADS_PER_WARP)


def row_step_cluster(*args: Any, **kwargs: Any) -> RowTerms:
    """Do `row_step_triton` with rows held across thread-block clusters; never run on a GPU yet."""
    return row_step_triton(*args, **kwargs, cluster=True)


def row_step_triton(
    logits: Tensor,  # (n, V)
    target: Tensor,  # (n,)
    safety_ids: Tensor,  # (K,)
    safety_logits: Tensor | None,  # (n, K)
    ref: Tensor,  # (n, K)
    id_weights: Tensor,  # (K,)
    options: RowOptions,
    *,
    norm: Tensor | None = None,  # (2, n)
    ce_scale: Tensor | None = None,  # (n,)
    penalty_scale: Tensor | None = None,  # (n,)
    grad: Tensor | None = None,  # (n, V)
    padded: bool = False,
    cluster: bool = False,
) -> RowTerms:
    """Compute terms and gradient of every row; `contracts.RowStep` says what the arguments are."""
    rows, vocab = logits.shape
    ids = safety_ids.shape[0]
    out = grad
    if grad is not None and grad.stride(1) != 1:
        out = torch.empty_like(grad, memory_format=torch.contiguous_format)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    if ref.shape[1] and ref.stride(1) != 1:
        ref = ref.contiguous()
    terms_wanted = norm is None
    if norm is None:
        norm = logits.new_empty((2, rows), dtype=torch.float32)
    metrics = options.metrics and terms_wanted
    found = logits.new_empty(
        (5 if metrics else 3, rows if terms_wanted else 0), dtype=torch.float32
    )
    ce, penalty, drift = found[:3]
    right, entropy = found[3:] if metrics else found.new_empty((2, 0))
    terms = RowTerms(ce, penalty, drift, norm, right, entropy)
    if not rows:
        return terms
    sizes = launch_sizes(
        vocab,
        ids,
        logits.element_size(),
        options,
        one_launch=terms_wanted and grad is not None,
        padded=padded,
        cluster=cluster,
    )
    safety_ids = safety_ids.to(torch.int32)  # half the bytes, in every row
    stash = None
    if ids and out is not None and (sizes.num_ctas > 1 or not BARRIERS_HOLD_LOADS):
        # These columns wait for a second launch: a barrier orders one thread block, not a cluster.
        stash = out.new_empty((rows, ids))
    # Triton launches on the current device, wherever its arguments are.
    with _current(logits.device):
        row_step_kernel[(rows,)](
            logits,
            target.contiguous(),
            safety_ids,
            safety_logits,
            ref,
            id_weights.contiguous(),
            norm,
            found,
            ce_scale,
            penalty_scale,
            out,
            stash,
            logits.stride(0),
            0 if safety_logits is None else safety_logits.stride(0),
            ref.stride(0),
            0 if out is None else out.stride(0),
            rows,
            vocab,
            -(-vocab // 16) * 16 if padded else vocab,
            ids,
            1.0 / max(ids, 1),
            options.ignore_index,
            options.logit_scale,
            options.softcap,
            options.label_smoothing,
            options.z_loss_weight,
            options.temperature,
            options.delta,
            HAS_SAFETY=ids > 0,
            HAS_SAFETY_LOGITS=safety_logits is not None,
            HAS_SOFTCAP=options.softcap != 0.0,
            HAS_SMOOTHING=options.label_smoothing > 0.0,
            HAS_Z_LOSS=options.z_loss_weight > 0.0,
            HAS_METRICS=metrics,
            HAS_NORM=not terms_wanted,
            HAS_GRAD=out is not None,
            HAS_STASH=stash is not None,
            PADDED=padded and vocab % 16 != 0,
            KIND=options.kind,
            # Said aloud because Triton's default changes in 3.10; the sums are the same either way.
            enable_fp_fusion=True,
            **_keywords(sizes),
        )
        if stash is not None and out is not None:
            scatter_kernel[(triton.cdiv(rows, 16),)](
                stash, safety_ids, out, out.stride(0), rows, vocab, ids, 16, sizes.BLOCK_K
            )
    if grad is not None and out is not None and out is not grad:
        grad.copy_(out)
    return terms


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type == "cuda":
        return torch.cuda.device(device)
    return torch.xpu.device(device) if device.type == "xpu" else contextlib.nullcontext()
