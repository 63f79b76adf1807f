"""The row step in Triton: the launcher and its block sizes; the kernel is in `row_kernel`.

Memory traffic per row of V logits: 2 reads and 1 write with a gradient (1 read if the row fits in
one program's registers), 1 read without.

No kernel has run on a GPU yet: they are tested in Triton's interpreter, and compiled.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..contracts import RowOptions, RowTerms
from .row_kernel import row_step_kernel, scatter_kernel

# A program works on one block at a time: 16 logits per thread, or 8 if the row is held or if
# options of the loss need more registers per logit ("busy"). A held row stays in registers between
# the passes, 128 bytes of it per thread (16 logits if busy): 32 of the 64 registers that let two
# rows of 512 threads share a multiprocessor. The numbers come from `python -m bench compile`: with
# them nothing spills.
_THREADS = 256  # small programs let several rows share a multiprocessor
_MAX_THREADS = 1024
_PER_THREAD = 16
_PER_THREAD_BUSY = 8
_HELD_THREADS = 512
_HELD_BYTES = 128  # of a row in the registers of one thread
THREADS_PER_WARP = 64 if torch.version.hip else 32
# Without a limit, ptxas spills a few bytes to use fewer registers and run more programs at a time,
# or takes so many that only one fits. (1,024 threads cannot have more than 64 anyway.)
CAPS_REGISTERS = bool(torch.version.cuda)
_REGISTERS = 64
_REGISTERS_BUSY = 80
_MANY_REGISTERS = 128  # for a held row with many safety ids
_MANY_IDS = 256
# AMD's compiler may move a load past a barrier to where its value is used, and another warp may
# have overwritten it by then. It does not if a store that uses the value precedes the barrier.
BARRIERS_HOLD_LOADS = not torch.version.hip


class Launch(NamedTuple):
    """The sizes of one launch; HELD: number of blocks in a row that is held in registers, or 0."""

    BLOCK_V: int
    BLOCK_K: int
    HELD: int
    num_warps: int
    maxnreg: int


def launch_sizes(
    vocab: int,
    ids: int,
    itemsize: int,
    options: RowOptions,
    *,
    one_launch: bool,
) -> Launch:
    """Return the sizes of a launch.

    Args:
        vocab: V.
        ids: K.
        itemsize: bytes of a logit.
        options: some need more registers per logit.
        one_launch: whether terms and gradient are computed together, so that holding the row pays.
    """
    block_k = max(16, triton.next_power_of_2(ids))
    is_busy = _is_busy(options)
    held_bytes = min(_HELD_BYTES, _PER_THREAD * itemsize) if is_busy else _HELD_BYTES
    registers = _REGISTERS_BUSY if is_busy else _REGISTERS
    fits = vocab * itemsize <= _HELD_THREADS * held_bytes
    if one_launch and fits and block_k <= _MAX_THREADS:
        threads = max(128, triton.next_power_of_2(-(-vocab * itemsize // held_bytes)))
        block_v = threads * _PER_THREAD_BUSY
        if block_k > _MANY_IDS:
            registers = _MANY_REGISTERS
        return Launch(block_v, block_k, -(-vocab // block_v), _warps(threads), registers)
    per_thread = _PER_THREAD_BUSY if is_busy else _PER_THREAD
    threads = min(_MAX_THREADS, max(_THREADS, block_k // 2))
    block_v = min(threads * per_thread, max(128, triton.next_power_of_2(vocab)))
    return Launch(block_v, block_k, 0, _warps(block_v // per_thread), registers)


def _is_busy(options: RowOptions) -> bool:
    return bool(options.softcap or options.label_smoothing or options.metrics)


def _keywords(sizes: Launch, wide: int) -> dict[str, int | bool]:
    """Return the sizes as the kernel's keywords; a load has `wide` consecutive logits."""
    keywords: dict[str, int | bool] = sizes._asdict()
    threads = sizes.num_warps * THREADS_PER_WARP
    keywords["WIDE"] = wide
    keywords["LANES"] = min(threads, sizes.BLOCK_V // wide)
    if not CAPS_REGISTERS or threads >= _MAX_THREADS:
        del keywords["maxnreg"]
    return keywords


def _is_aligned(logits: Tensor, grad: Tensor | None, padded: bool) -> bool:
    """Return whether every row can be read and written 16 bytes at a time."""
    numbers = [0 if padded else logits.shape[1]]
    for rows in (logits, logits if grad is None else grad):
        numbers += [rows.stride(0), rows.data_ptr()]
    return not any(number % 16 for number in numbers)


def _warps(threads: int) -> int:
    return max(4, min(threads, _MAX_THREADS) // THREADS_PER_WARP)


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
) -> RowTerms:
    """Compute terms and gradient of every row; `contracts.RowStep` documents the arguments."""
    rows, vocab = logits.shape
    ids = safety_ids.shape[0]
    out = grad
    if grad is not None and grad.stride(1) != 1:
        out = torch.empty_like(grad, memory_format=torch.contiguous_format)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    if ref.shape[1] and ref.stride(1) != 1:
        ref = ref.contiguous()
    target = target.contiguous()
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
    )
    safety_ids = safety_ids.to(torch.int32)  # half the bytes, in every row
    stash = None
    if out is not None and not BARRIERS_HOLD_LOADS:  # a second launch writes these columns
        stash = out.new_empty((rows, ids + 1))
    wide = 16 // logits.element_size() if _is_aligned(logits, out, padded) else 1
    # Triton launches on the current device, not on that of the arguments.
    with _current(logits.device):
        row_step_kernel[(rows,)](
            logits,
            target,
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
            KIND=options.kind,
            # Explicit, because Triton's default changes in 3.10; the sums are the same either way.
            enable_fp_fusion=True,
            **_keywords(sizes, wide),
        )
        if stash is not None and out is not None:
            scatter_kernel[(triton.cdiv(rows, 16),)](
                stash,
                safety_ids,
                target,
                out,
                out.stride(0),
                rows,
                vocab,
                ids,
                BLOCK_N=16,
                BLOCK_K=triton.next_power_of_2(ids + 1),
            )
    if grad is not None and out is not None and out is not grad:
        grad.copy_(out)
    return terms


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type == "cuda":
        return torch.cuda.device(device)
    return torch.xpu.device(device) if device.type == "xpu" else contextlib.nullcontext()
