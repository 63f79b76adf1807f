"""The row step as one Triton kernel, a program per row.

First pass: online maximum and sum (Milakov and Gimelshein, arXiv:1805.02867), the target's logit
and the safety logits. Second pass: the gradient, written over the row; the target's column is
computed whole inside it, the safety columns beside it, in float32 and rounded once.

Flags (HAS_...) are compiled in; numbers are not, so that no schedule recompiles.
"""

import triton
import triton.language as tl

LEAST_REST = tl.constexpr(2.0**-13)  # as in penalties


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
def _online(
    z, offs_v, z_y, base, m, d, total, first, plogp, V,
    HAS_SMOOTHING: tl.constexpr, HAS_METRICS: tl.constexpr,
):  # fmt: skip
    """Take a block of logits (-inf beyond V) into the running sums of its row."""
    m_new = tl.maximum(m, tl.max(z, 0))
    # A row that has been all -inf so far keeps d = 0: -inf - -inf would be NaN.
    safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    shrink = tl.exp(m - safe)
    e = tl.exp(z - safe)
    if HAS_METRICS:
        first = tl.minimum(first, tl.min(tl.where(z == z_y, offs_v, V), 0))
        moved = tl.where(d > 0.0, (m - safe) * d, 0.0)
        plogp = shrink * (plogp + moved) + tl.sum(tl.where(e > 0.0, e * (z - safe), 0.0), 0)
    if HAS_SMOOTHING:
        total += tl.sum(tl.where(offs_v < V, z - base, 0.0), 0)
    d = d * shrink + tl.sum(e, 0)
    return m_new, d, total, first, plogp


@triton.jit
def _penalty(z_s, r, a, lse, mask_k, inv_k, temperature, delta, KIND: tl.constexpr):
    """Return phi, d phi / d z_S on S, and the drift: `penalties.KINDS` in float32 registers."""
    if KIND == "logprob" or KIND == "coarse_kl":
        drift = tl.where(mask_k, (z_s - lse) - r, 0.0)
    else:
        drift = tl.where(mask_k, z_s - r, 0.0)
    if KIND == "subset_kl":
        gone = float("-inf")
        x = tl.where(mask_k, z_s / temperature, gone)
        w = tl.where(mask_k, r / temperature + tl.log(a), gone)
        x -= tl.max(x, 0)
        w -= tl.max(w, 0)
        log_s = x - tl.log(tl.sum(tl.exp(x), 0))
        log_q = w - tl.log(tl.sum(tl.exp(w), 0))
        q = tl.exp(log_q)
        # 0 log 0 is 0: an id of weight 0 has q = 0
        terms = tl.where(q > 0.0, q * (log_q - log_s), tl.where(q == 0.0, 0.0, q))
        phi = temperature * temperature * tl.sum(terms, 0)
        slope = temperature * (tl.exp(log_s) - q)
    elif KIND == "coarse_kl":
        is_held = mask_k & (a > 0.0)
        p = tl.where(is_held, tl.exp(z_s - lse), 0.0)
        q = tl.where(is_held, tl.exp(r), 0.0)
        rest = 1.0 - tl.sum(p, 0)
        ref_rest = 1.0 - tl.sum(q, 0)
        # by where, which keeps NaN, and not by maximum
        is_free = rest > LEAST_REST
        rest = tl.where(rest < LEAST_REST, LEAST_REST, rest)
        ref_rest = tl.where(ref_rest < LEAST_REST, LEAST_REST, ref_rest)
        gap = tl.where(q == 0.0, 0.0, -q * drift)
        phi = tl.sum(a * (gap + (p - q)), 0)
        ratio = tl.div_rn(ref_rest, rest)  # of equal ones 1, which a GPU's `/` may miss by 2^-22
        phi += ref_rest * tl.log(ratio) + (rest - ref_rest)
        slope = a * (p - q) + p * tl.where(is_free, ratio - 1.0, 0.0)
    else:
        a = a * inv_k
        # by where, since minimum and maximum would make a number of NaN
        if KIND == "huber":
            x = tl.where(drift > delta, delta, tl.where(drift < -delta, -delta, drift))
            phi = tl.sum(a * x * (drift - 0.5 * x), 0)
            slope = a * x
        else:
            x = drift
            if KIND == "hinge":
                x = tl.where(drift > 0.0, 0.0, drift)
            if KIND == "centered":
                x = tl.where(mask_k, drift - tl.sum(a * drift, 0) / tl.sum(a, 0), 0.0)
            phi = tl.sum(a * x * x, 0)
            slope = 2.0 * a * x
    return phi, slope, drift


@triton.jit
def _soft_gradient(
    z, is_y, m, log_d, ce_scale, takes_ce, extra, smoothing, inv_v, logit_scale, softcap,
    HAS_EXTRA: tl.constexpr, HAS_SMOOTHING: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The gradient without the penalty's pull on its own columns, unrounded."""
    p = tl.exp((z - m) - log_d)
    if HAS_SMOOTHING:
        dz = (tl.where(is_y, (p - 1.0) + smoothing, p) - smoothing * inv_v) * ce_scale
    else:
        dz = tl.where(is_y, p - 1.0, p) * ce_scale
    if HAS_EXTRA:  # of the z-loss, and of a penalty on log-probabilities
        dz = tl.where(takes_ce, dz, 0.0) + extra * p
        takes = takes_ce | (extra != 0.0)
    else:
        takes = takes_ce
    du = dz * _slope(z, logit_scale, softcap, HAS_SOFTCAP)
    return tl.where(takes, du, 0.0)  # not a product: inf and NaN of a masked row stay out


@triton.jit(do_not_specialize=["N"])
def scatter_kernel(
    Values,  # (n, K)
    SafetyIds,  # (K,)
    Grad,  # (n, V)
    stride_grad_n,
    N,
    V,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write the safety columns of 16 or so rows, after a launch that wrote the rows."""
    offs_n = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    offs_k = tl.arange(0, BLOCK_K)
    s = tl.load(SafetyIds + offs_k, mask=offs_k < K, other=-1)[None, :]
    mask = (offs_n < N) & (s >= 0) & (s < V)
    values = tl.load(Values + offs_n * K + offs_k[None, :], mask=mask)
    tl.store(Grad + offs_n * stride_grad_n + s, values, mask=mask)


# Slices of a batch start anywhere, and a chunk or a last batch has any number of rows: neither may
# compile anew. The rows' own alignment stays compiled in, for wide loads.
@triton.jit(
    do_not_specialize=["N"],
    do_not_specialize_on_alignment=[
        "Target", "SafetyLogits", "Ref", "Norm", "Terms", "CeScale", "PenaltyScale", "Stash",
    ],
)  # fmt: skip
def row_step_kernel(
    Logits,  # (n, V)
    Target,  # (n,)
    SafetyIds,  # (K,) int32
    SafetyLogits,  # (n, K) or None
    Ref,  # (n, K)
    IdWeights,  # (K,)
    Norm,  # (2, n) m and log d
    Terms,  # (5, n) ce, penalty, drift, right, entropy; the last two with metrics only
    CeScale,  # (n,) or None
    PenaltyScale,  # (n,) or None
    Grad,  # (n, V) or None; may be Logits
    Stash,  # (n, K) or None: the safety columns of Grad, for `scatter_kernel`
    stride_logits_n,
    stride_safety_n,
    stride_ref_n,
    stride_grad_n,
    N,
    V,
    v_padded,
    K,
    inv_k,
    ignore_index,
    logit_scale,
    softcap,
    smoothing,
    z_loss_weight,
    temperature,
    delta,
    HAS_SAFETY: tl.constexpr,
    HAS_SAFETY_LOGITS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
    HAS_METRICS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_STASH: tl.constexpr,
    PADDED: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ON_CHIP: tl.constexpr,
):
    """Make one row's terms (or take its Norm), and write its gradient if there is a Grad."""
    pid_n = tl.program_id(0).to(tl.int64)
    Logits += pid_n * stride_logits_n
    y = tl.load(Target + pid_n)
    kept = y != ignore_index
    inside = (y >= 0) & (y < V)
    # Single columns are read before the first pass and not after it: the barriers below are what
    # keeps a faster warp from overwriting them (Grad may be Logits) before a slower one has read.
    u_y = tl.load(Logits + y, mask=inside, other=0.0)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    if HAS_SAFETY:
        s = tl.load(SafetyIds + offs_k, mask=mask_k, other=-1)
        # Two values of one logit: the row's own, of which m and d are made, for the softmax, and
        # the finer one for the penalty. Mixed, they spoil p_y - 1 at y in S.
        mask_s = mask_k & (s >= 0) & (s < V)
        u_s = tl.load(Logits + s, mask=mask_s, other=0.0)
        z_u = _scale_and_cap(u_s, logit_scale, softcap, HAS_SOFTCAP)

    offs_v = tl.arange(0, BLOCK_V)
    if ON_CHIP:
        u = tl.load(Logits + offs_v, mask=offs_v < v_padded, other=float("-inf"))
    if HAS_NORM:
        m = tl.load(Norm + pid_n)
        log_d = tl.load(Norm + N + pid_n)
    else:
        z_y = _scale_and_cap(u_y, logit_scale, softcap, HAS_SOFTCAP)
        base = tl.where(tl.abs(z_y) < float("inf"), z_y, 0.0)  # for a sum of small numbers
        m = float("-inf")
        d = 0.0
        total = 0.0
        first = V  # the first logit that equals the target's
        plogp = 0.0
        if ON_CHIP:
            z = _scale_and_cap(u, logit_scale, softcap, HAS_SOFTCAP)
            z = tl.where(offs_v < V, z, float("-inf"))
            m, d, total, first, plogp = _online(
                z, offs_v, z_y, base, m, d, total, first, plogp, V, HAS_SMOOTHING, HAS_METRICS
            )
        else:
            for start in range(0, V, BLOCK_V):
                at = start + offs_v
                x = tl.load(Logits + at, mask=at < v_padded, other=float("-inf"))
                z = _scale_and_cap(x, logit_scale, softcap, HAS_SOFTCAP)
                if HAS_SOFTCAP or PADDED:  # the cap lifts the padding's -inf to -softcap
                    z = tl.where(at < V, z, float("-inf"))
                m, d, total, first, plogp = _online(
                    z, at, z_y, base, m, d, total, first, plogp, V, HAS_SMOOTHING, HAS_METRICS
                )
        log_d = tl.log(d)
        ce = log_d - (z_y - m)  # (lse - m) - (z_y - m): the small numbers, not the large ones
        if HAS_SMOOTHING:
            smooth = log_d - ((base - m) + total / V)
            ce = (1.0 - smoothing) * ce + smoothing * smooth
        ce = tl.where(inside, ce, float("nan"))
        Terms += pid_n
        tl.store(Terms, tl.where(kept, ce, 0.0))
        tl.store(Norm + pid_n, m)
        tl.store(Norm + N + pid_n, log_d)
        if HAS_METRICS:
            # of equal maxima the first is the prediction
            tl.store(Terms + N + N + N, tl.where((m > z_y) | (first < y), 0.0, 1.0))
            tl.store(Terms + N + N + N + N, log_d - plogp / d)
    lse = m + log_d

    if HAS_SAFETY:
        z_s = z_u
        if HAS_SAFETY_LOGITS:
            z_s = tl.load(SafetyLogits + pid_n * stride_safety_n + offs_k, mask=mask_k, other=0.0)
        r = tl.load(Ref + pid_n * stride_ref_n + offs_k, mask=mask_k, other=0.0)
        a = tl.load(IdWeights + offs_k, mask=mask_k, other=0.0)
        phi, pull, drift = _penalty(z_s, r, a, lse, mask_k, inv_k, temperature, delta, KIND)
        if not HAS_NORM:
            # a maximum skips NaN, and would report a broken row as a healthy one
            broken = tl.sum((drift != drift).to(tl.int32), 0) > 0
            worst = tl.max(tl.abs(drift), 0)
            tl.store(Terms + N, phi)
            tl.store(Terms + N + N, tl.where(broken, float("nan"), worst))
    elif not HAS_NORM:
        tl.store(Terms + N, 0.0)
        tl.store(Terms + N + N, 0.0)

    if HAS_GRAD:
        Grad += pid_n * stride_grad_n
        inv_v = 1.0 / V
        ce_scale = tl.load(CeScale + pid_n)
        takes_ce = ce_scale != 0.0
        ce_scale = tl.where(inside | (kept == 0), ce_scale, float("nan"))
        extra = 0.0
        ON_LOG_PROBS: tl.constexpr = KIND == "logprob" or KIND == "coarse_kl"
        HAS_EXTRA: tl.constexpr = HAS_Z_LOSS or (HAS_SAFETY and ON_LOG_PROBS)
        if HAS_Z_LOSS:
            extra = tl.where(takes_ce, ce_scale * (2.0 * z_loss_weight * lse), 0.0)
        if HAS_SAFETY:
            penalty_scale = tl.load(PenaltyScale + pid_n)
            pull = tl.where(penalty_scale != 0.0, penalty_scale * pull, 0.0)
            if ON_LOG_PROBS:
                extra -= tl.sum(pull, 0)
            du_s = _soft_gradient(
                z_u, s == y, m, log_d, ce_scale, takes_ce, extra, smoothing, inv_v, logit_scale,
                softcap, HAS_EXTRA, HAS_SMOOTHING, HAS_SOFTCAP,
            )  # fmt: skip
            slope_s = _slope(z_s, logit_scale, softcap, HAS_SOFTCAP)
            du_s += tl.where(pull != 0.0, pull * slope_s, 0.0)
            if HAS_STASH:
                tl.store(Stash + pid_n * K + offs_k, du_s.to(Stash.dtype.element_ty), mask=mask_k)
        if HAS_SAFETY or not HAS_NORM:
            tl.debug_barrier()  # every warp has read its single columns
        if ON_CHIP:
            z = _scale_and_cap(u, logit_scale, softcap, HAS_SOFTCAP)
            z = tl.where(offs_v < V, z, float("-inf"))
            du = _soft_gradient(
                z, offs_v == y, m, log_d, ce_scale, takes_ce, extra, smoothing, inv_v, logit_scale,
                softcap, HAS_EXTRA, HAS_SMOOTHING, HAS_SOFTCAP,
            )  # fmt: skip
            if PADDED:
                du = tl.where(offs_v < V, du, 0.0)
            tl.store(Grad + offs_v, du.to(Grad.dtype.element_ty), mask=offs_v < v_padded)
        else:
            for start in range(0, V, BLOCK_V):
                at = start + offs_v
                x = tl.load(Logits + at, mask=at < v_padded, other=float("-inf"))
                z = _scale_and_cap(x, logit_scale, softcap, HAS_SOFTCAP)
                du = _soft_gradient(
                    z, at == y, m, log_d, ce_scale, takes_ce, extra, smoothing, inv_v, logit_scale,
                    softcap, HAS_EXTRA, HAS_SMOOTHING, HAS_SOFTCAP,
                )  # fmt: skip
                if PADDED:
                    du = tl.where(at < V, du, 0.0)
                tl.store(Grad + at, du.to(Grad.dtype.element_ty), mask=at < v_padded)
        if HAS_SAFETY and not HAS_STASH:
            tl.debug_barrier()  # other threads of this program wrote these columns just now
            tl.store(Grad + s, du_s.to(Grad.dtype.element_ty), mask=mask_s)
