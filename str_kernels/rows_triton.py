"""The row step as one Triton kernel: kernel, launcher and block sizes.

One program per row. First pass: online maximum and sum (Milakov and Gimelshein, arXiv:1805.02867),
the target's logit and the safety logits. Second pass: the gradient, written over the row; the
target's column is computed whole inside it, the safety columns after it, in float32 and rounded
once. Traffic per row: 2 reads and 1 write of V logits with a gradient, 1 read without.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contracts import RowOptions, RowTerms

# One row is one program, and a block is what the program holds in registers at a time: 16 elements
# per thread stay clear of spills in float32 (8192 with 16 warps spilled on sm_90), and small
# programs let several rows share a multiprocessor.
_MAX_BLOCK_V = 4096
_MAX_BLOCK_K = 256
_MAX_WARPS = 8
_ELEMENTS_PER_THREAD = 16


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
) -> RowTerms:
    """Compute terms and gradient of every row; `contracts.RowStep` says what the arguments are."""
    rows, vocab = logits.shape
    ids = safety_ids.shape[0]
    out = grad
    if grad is not None and grad.stride(1) != 1:
        out = torch.empty_like(grad, memory_format=torch.contiguous_format)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    raw = None
    if ids and out is not None and out.data_ptr() == logits.data_ptr():
        # The kernel needs these columns after it wrote the row, which here is the same memory.
        raw = logits.index_select(1, safety_ids)
    ce, penalty, drift = logits.new_empty((3, rows), dtype=torch.float32)
    terms_wanted = norm is None
    if norm is None:
        norm = logits.new_empty((2, rows), dtype=torch.float32)
    if ref.shape[1] and ref.stride(1) != 1:
        ref = ref.contiguous()
    if rows:
        block_v, block_k, num_warps = block_sizes(vocab, ids)
        _row_step_kernel[(rows,)](
            logits,
            target.contiguous(),
            safety_ids.contiguous(),
            raw,
            safety_logits,
            ref,
            id_weights.contiguous(),
            norm,
            ce,
            penalty,
            drift,
            ce_scale,
            penalty_scale,
            out,
            logits.stride(0),
            0 if safety_logits is None else safety_logits.stride(0),
            ref.stride(0),
            0 if out is None else out.stride(0),
            rows,
            vocab,
            ids,
            1.0 / max(ids, 1),
            options.ignore_index,
            options.logit_scale,
            options.softcap,
            HAS_SAFETY=ids > 0,
            HAS_RAW=raw is not None,
            HAS_SAFETY_LOGITS=safety_logits is not None,
            HAS_SOFTCAP=options.softcap != 0.0,
            HAS_NORM=not terms_wanted,
            HAS_GRAD=out is not None,
            BLOCK_V=block_v,
            BLOCK_K=block_k,
            num_warps=num_warps,
            # Said aloud because Triton's default changes in 3.10; the sums are the same either way.
            enable_fp_fusion=True,
        )
    if grad is not None and out is not None and out is not grad:
        grad.copy_(out)
    if not terms_wanted:
        return RowTerms(ce[:0], penalty[:0], drift[:0], norm)
    return RowTerms(ce, penalty, drift, norm)


def block_sizes(vocab: int, ids: int) -> tuple[int, int, int]:
    """Return (BLOCK_V, BLOCK_K, num_warps) for a vocabulary and a number of safety ids."""
    block_v = min(_MAX_BLOCK_V, max(128, triton.next_power_of_2(vocab)))
    block_k = min(_MAX_BLOCK_K, max(16, triton.next_power_of_2(ids)))
    num_warps = min(_MAX_WARPS, max(4, block_v // (32 * _ELEMENTS_PER_THREAD)))
    return block_v, block_k, num_warps


@triton.jit
def _scale_and_cap(u, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    z = u.to(tl.float32) * logit_scale
    if HAS_SOFTCAP:
        x = z / softcap
        # tanh from exp, since the interpreter has no libdevice: exp(-2|x|) cannot overflow, and
        # below 0.25, where 1 - exp cancels, the odd series is exact to 1 ulp of float32.
        a = tl.abs(x)
        e = tl.exp(-2.0 * a)
        far = (1.0 - e) / (1.0 + e)
        s = x * x
        series = -0.05396825396825397 + s * (0.021869488536155203 - s * 0.008863235529902197)
        near = a * (1.0 + s * (-0.3333333333333333 + s * (0.13333333333333333 + s * series)))
        th = tl.where(a < 0.25, near, far)
        z = softcap * tl.where(x < 0, -th, th)
    return z


@triton.jit
def _slope(z, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """dz/du at a capped logit z."""
    if HAS_SOFTCAP:
        return logit_scale * (1.0 - (z / softcap) * (z / softcap))
    else:
        return logit_scale


@triton.jit
def _row_step_kernel(
    Logits,  # (n, V)
    Target,  # (n,)
    SafetyIds,  # (K,)
    Raw,  # (n, K) the safety ids' columns of Logits, or None where Grad is not Logits
    SafetyLogits,  # (n, K) or None
    Ref,  # (n, K)
    IdWeights,  # (K,)
    Norm,  # (2, n) m and log d
    Ce,  # (n,)
    Penalty,  # (n,)
    Drift,  # (n,)
    CeScale,  # (n,) or None
    PenaltyScale,  # (n,) or None
    Grad,  # (n, V) or None; may be Logits
    stride_logits_n,
    stride_safety_n,
    stride_ref_n,
    stride_grad_n,
    N,
    V,
    K,
    inv_k,
    ignore_index,
    logit_scale,
    softcap,
    HAS_SAFETY: tl.constexpr,
    HAS_RAW: tl.constexpr,
    HAS_SAFETY_LOGITS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid_n = tl.program_id(0).to(tl.int64)
    Logits += pid_n * stride_logits_n
    Ref += pid_n * stride_ref_n
    if HAS_SAFETY_LOGITS:
        SafetyLogits += pid_n * stride_safety_n
    y = tl.load(Target + pid_n)
    kept = y != ignore_index
    inside = (y >= 0) & (y < V)

    if HAS_NORM:
        m = tl.load(Norm + pid_n)
        log_d = tl.load(Norm + N + pid_n)
    else:
        # Read before the pass and not after it: the pass's reductions are what keeps a faster warp
        # from overwriting this column (Grad may be Logits) before a slower one has read it.
        u_y = tl.load(Logits + y, mask=inside, other=0.0)
        m = float("-inf")
        d = 0.0
        for start in range(0, V, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            u = tl.load(Logits + offs_v, mask=offs_v < V, other=float("-inf"))
            z = _scale_and_cap(u, logit_scale, softcap, HAS_SOFTCAP)
            if HAS_SOFTCAP:  # the cap lifts the padding's -inf to -softcap
                z = tl.where(offs_v < V, z, float("-inf"))
            m_new = tl.maximum(m, tl.max(z, 0))
            # A row that has been all -inf so far keeps d = 0: -inf - -inf would be NaN.
            safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            d = d * tl.exp(m - safe) + tl.sum(tl.exp(z - safe), 0)
            m = m_new
        log_d = tl.log(d)
        z_y = _scale_and_cap(u_y, logit_scale, softcap, HAS_SOFTCAP)
        ce = log_d - (z_y - m)  # (lse - m) - (z_y - m): the small numbers, not the large ones
        ce = tl.where(inside, ce, float("nan"))
        tl.store(Ce + pid_n, tl.where(kept, ce, 0.0))
        tl.store(Norm + pid_n, m)
        tl.store(Norm + N + pid_n, log_d)
        penalty = 0.0
        drift = 0.0
        n_nan = 0
        if HAS_SAFETY:
            for start in range(0, K, BLOCK_K):
                offs_k = start + tl.arange(0, BLOCK_K)
                mask_k = offs_k < K
                s = tl.load(SafetyIds + offs_k, mask=mask_k, other=0)
                if HAS_SAFETY_LOGITS:
                    z_s = tl.load(SafetyLogits + offs_k, mask=mask_k, other=0.0)
                else:
                    u_s = tl.load(Logits + s, mask=mask_k & (s >= 0) & (s < V), other=0.0)
                    z_s = _scale_and_cap(u_s, logit_scale, softcap, HAS_SOFTCAP)
                r = tl.load(Ref + offs_k, mask=mask_k, other=0.0)
                a = tl.load(IdWeights + offs_k, mask=mask_k, other=0.0)
                gap = tl.where(mask_k, z_s - r, 0.0)
                penalty += tl.sum(a * gap * gap, 0)
                worst = tl.max(tl.abs(gap), 0)
                # a maximum skips NaN, and would report a broken row as a healthy one
                drift = tl.maximum(drift, worst)
                n_nan += tl.sum((gap != gap).to(tl.int32), 0)
        tl.store(Penalty + pid_n, penalty * inv_k)
        tl.store(Drift + pid_n, tl.where(n_nan > 0, float("nan"), drift))

    if HAS_GRAD:
        Grad += pid_n * stride_grad_n
        ce_scale = tl.load(CeScale + pid_n)
        has_ce = ce_scale != 0.0
        ce_scale = tl.where(inside | (kept == 0), ce_scale, float("nan"))
        for start in range(0, V, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            mask_v = offs_v < V
            u = tl.load(Logits + offs_v, mask=mask_v, other=float("-inf"))
            z = _scale_and_cap(u, logit_scale, softcap, HAS_SOFTCAP)
            p = tl.exp((z - m) - log_d)
            dz = tl.where(offs_v == y, p - 1.0, p) * ce_scale
            du = dz * _slope(z, logit_scale, softcap, HAS_SOFTCAP)
            du = tl.where(has_ce, du, 0.0)  # not a product: inf and NaN of a masked row stay out
            tl.store(Grad + offs_v, du.to(Grad.dtype.element_ty), mask=mask_v)
        if HAS_SAFETY:
            # Other threads of this program wrote these columns just now.
            tl.debug_barrier()
            penalty_scale = tl.load(PenaltyScale + pid_n)
            for start in range(0, K, BLOCK_K):
                offs_k = start + tl.arange(0, BLOCK_K)
                mask_k = offs_k < K
                s = tl.load(SafetyIds + offs_k, mask=mask_k, other=0)
                mask_s = mask_k & (s >= 0) & (s < V)
                # Two values of one logit: the row's own, of which m and d are made, for the
                # softmax, and the finer one for the penalty. Mixed, they spoil p_y - 1 at y in S.
                if HAS_RAW:
                    u_s = tl.load(Raw + pid_n * K + offs_k, mask=mask_k, other=0.0)
                else:
                    u_s = tl.load(Logits + s, mask=mask_s, other=0.0)
                z_u = _scale_and_cap(u_s, logit_scale, softcap, HAS_SOFTCAP)
                z_s = z_u
                if HAS_SAFETY_LOGITS:
                    z_s = tl.load(SafetyLogits + offs_k, mask=mask_k, other=0.0)
                r = tl.load(Ref + offs_k, mask=mask_k, other=0.0)
                a = tl.load(IdWeights + offs_k, mask=mask_k, other=0.0)
                p_s = tl.exp((z_u - m) - log_d)
                dz = tl.where(s == y, p_s - 1.0, p_s) * ce_scale
                du = dz * _slope(z_u, logit_scale, softcap, HAS_SOFTCAP)
                du = tl.where(has_ce, du, 0.0)
                pull = penalty_scale * (2.0 * inv_k) * a * (z_s - r)
                pull *= _slope(z_s, logit_scale, softcap, HAS_SOFTCAP)
                du += tl.where(penalty_scale != 0.0, pull, 0.0)
                tl.store(Grad + s, du.to(Grad.dtype.element_ty), mask=mask_s)
