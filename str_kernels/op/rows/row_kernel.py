"""The row step as one Triton kernel, a program per row.

First pass: each thread computes maximum and sum of its own logits (online: Milakov and Gimelshein,
arXiv:1805.02867). Second pass: the softmax times a factor is written over the row. Then the columns
of the target and of the safety ids are computed in float32 and rounded once. All work that can be
done once per thread, row or column is not done per logit: `python -m bench sass` counts the rest.

Flags (HAS_...) are compile-time constants; numbers are not, so that a schedule never recompiles.
"""

import triton
import triton.language as tl

from .penalty_kernel import masked_sum, penalty

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite: -inf - -inf would be NaN


@triton.jit
def _exp(x):
    # One instruction, which flushes results below 2^-126 to 0; tl.exp does not, and takes four.
    return tl.exp2(x * LOG2_E)


@triton.jit
def _tanh(x):
    # By exp, since the interpreter has no libdevice. exp(-2|x|) cannot overflow; below 0.25, where
    # 1 - 2 e / (1 + e) would cancel, the odd series is exact to 1 ulp of float32.
    e = _exp(-2.0 * tl.abs(x))
    rest = tl.rsqrt((1.0 + e) * (1.0 + e))  # 1 / (1 + e); a division takes eight instructions
    far = (1.0 - 2.0 * (e * rest)).to(tl.int32, bitcast=True)
    sign = x.to(tl.int32, bitcast=True) & -2147483648  # the sign bit: one instruction, no select
    s = x * x
    series = 0.13333333333333333 + s * (-0.05396825396825397 + s * 0.021869488536155203)
    near = x * (1.0 + s * (-0.3333333333333333 + s * series))
    return tl.where(tl.abs(x) < 0.25, near, (far | sign).to(tl.float32, bitcast=True))


@triton.jit
def _capped(u, to_cap, HAS_SOFTCAP: tl.constexpr):
    """Return x with logit = x * rate; the product is left for later, to be fused with a sum."""
    x = u.to(tl.float32)
    if HAS_SOFTCAP:
        x = _tanh(x * to_cap)
    return x


@triton.jit
def _load(Logits, start, offs, v_padded, IS_EDGE: tl.constexpr, PAIRED: tl.constexpr):
    """Load a block; PAIRED: two logits of 16 bits in each int32."""
    if PAIRED:
        Logits = Logits.to(tl.pointer_type(tl.int32), bitcast=True)
        start = start // 2
        v_padded = v_padded // 2
    if IS_EDGE:
        return tl.load(Logits + start + offs, mask=start + offs < v_padded, other=0)
    else:
        return tl.load(Logits + start + offs)


@triton.jit
def _logits(
    u, inside, to_cap, DTYPE: tl.constexpr, IS_EDGE: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    """Return x of a loaded block, -inf outside the row."""
    if u.dtype == tl.int32:  # PAIRED
        if DTYPE == tl.bfloat16:  # the upper half of a float32
            low, high = (u << 16), (u & -65536)
            u = tl.interleave(low, high).to(tl.float32, bitcast=True)
        else:
            low, high = u.to(tl.int16), (u >> 16).to(tl.int16)
            u = tl.interleave(low, high).to(DTYPE, bitcast=True)
    x = _capped(u, to_cap, HAS_SOFTCAP)
    if IS_EDGE:
        x = tl.where(inside, x, float("-inf"))
    return x


@triton.jit
def _of_thread(x):
    """Sum each thread's part of a block."""
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def _online(
    x, rate, inside, top, d, total, plogp, base,
    IS_EDGE: tl.constexpr, HAS_SMOOTHING: tl.constexpr, HAS_METRICS: tl.constexpr,
):  # fmt: skip
    """Add a block to each thread's running sums."""
    m = tl.maximum(top, tl.max(tl.max(x, 2), 0) * rate)
    below = x * rate - m[None, :, None]
    e = _exp(below)
    shrink = _exp(tl.maximum(top - m, -1000.0))  # top may be LOWEST, whose difference overflows
    if HAS_METRICS:
        moved = tl.where(d > 0.0, (top - m) * d, 0.0)
        # 0 (-inf) should be 0, hence the maximum. It drops NaN, but then e is NaN.
        plogp = shrink * (plogp + moved) + _of_thread(e * tl.maximum(below, -1000.0))
    if HAS_SMOOTHING:
        apart = m - base
        if IS_EDGE:
            total += _of_thread(tl.where(inside, below + apart[None, :, None], 0.0))
        else:
            total += _of_thread(below) + (x.shape[0] * x.shape[2]) * apart
    return m, d * shrink + _of_thread(e), total, plogp


@triton.jit
def _write(
    Grad, at, x, rate, m, factor, flat, V, v_padded,
    IS_EDGE: tl.constexpr, HAS_SMOOTHING: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Write a block of the gradient, without regard to the target's and safety columns."""
    du = _exp(x * rate - m) * factor
    if HAS_SMOOTHING:
        du -= flat
    if HAS_SOFTCAP:
        du *= 1.0 - x * x
    if IS_EDGE:
        du = tl.where(at < V, du, 0.0).to(Grad.dtype.element_ty)
        tl.store(Grad + at, du, mask=at < v_padded)
    else:
        tl.store(Grad + at, du.to(Grad.dtype.element_ty))


@triton.jit
def _column(x, is_y, rate, m, inv_d, ce_scale, takes_ce, extra, smoothing, inv_v, slope):
    """Return the unrounded gradient at single columns, without the penalty's direct part."""
    p = _exp(x * rate - m) * inv_d
    dz = (tl.where(is_y, (p - 1.0) + smoothing, p) - smoothing * inv_v) * ce_scale
    dz = tl.where(takes_ce, dz, 0.0) + tl.where(extra != 0.0, extra * p, 0.0)
    # not a product: inf and NaN of a masked row stay out
    return tl.where(takes_ce | (extra != 0.0), dz * slope, 0.0)


@triton.jit
def _slope(x, logit_scale, HAS_SOFTCAP: tl.constexpr):
    """Return dz/du of the logit x * rate."""
    if HAS_SOFTCAP:
        return logit_scale * (1.0 - x * x)
    else:
        return logit_scale


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["Target"])
def scatter_kernel(
    Values,  # (n, K + 1)
    SafetyIds,  # (K,)
    Target,  # (n,)
    Grad,  # (n, V)
    stride_grad_n,
    N,
    V,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write the safety and target columns of some rows, after the launch that wrote the rest."""
    offs_n = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    y = tl.load(Target + offs_n, mask=offs_n < N, other=-1)
    s = tl.load(SafetyIds + offs_k, mask=offs_k < K, other=-1)
    y_in_s = tl.sum((s == y).to(tl.int32), 1)[:, None] > 0  # only the id's value is then complete
    column = tl.where(offs_k < K, s, tl.where((offs_k == K) & (y_in_s == 0), y, -1))
    mask = (offs_n < N) & (column >= 0) & (column < V)
    values = tl.load(Values + offs_n * (K + 1) + offs_k, mask=mask)
    tl.store(Grad + offs_n * stride_grad_n + column, values, mask=mask)


# Slices of a batch start anywhere, and a chunk or a last batch has any number of rows: neither may
# cause a recompilation. The alignment of Logits and Grad is still specialised, for wide loads.
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
    Stash,  # (n, K + 1) or None: S and target columns of Grad, for `scatter_kernel`
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
    KIND: tl.constexpr,
    BLOCK_V: tl.constexpr,  # logits at a time
    LANES: tl.constexpr,  # number of threads
    WIDE: tl.constexpr,  # consecutive logits in one load
    BLOCK_K: tl.constexpr,
    HELD: tl.constexpr,  # number of blocks in the row, if all stay in registers, or 0
):
    """Compute one row's terms (or read its Norm), and write its gradient if there is a Grad."""
    pid_n = tl.program_id(0).to(tl.int64)
    Logits += pid_n * stride_logits_n
    y = tl.load(Target + pid_n)
    kept = y != ignore_index
    inside = (y >= 0) & (y < V)
    column = tl.where(inside, y, 0).to(tl.int32)
    rate, to_cap = logit_scale, 0.0
    if HAS_SOFTCAP:
        rate, to_cap = softcap, tl.div_rn(logit_scale, softcap)
    # Single columns are read before the first pass: the barriers below then keep a faster warp from
    # overwriting them (Grad may be Logits) before a slower one has read them.
    x_y = _capped(tl.load(Logits + y, mask=inside, other=0.0), to_cap, HAS_SOFTCAP)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    if HAS_SAFETY:
        s = tl.load(SafetyIds + offs_k, mask=mask_k, other=-1)
        # Each safety logit has two values: the row's own, from which m and d come, for the softmax,
        # and a more precise one for the penalty. Mixing them would spoil p_y - 1 if y is in S.
        mask_s = mask_k & (s >= 0) & (s < V)
        x_s = _capped(tl.load(Logits + s, mask=mask_s, other=0.0), to_cap, HAS_SOFTCAP)

    # A thread's logits lie along the first and last axis, so that sums over them need no exchange.
    DTYPE: tl.constexpr = Logits.dtype.element_ty
    PAIRED: tl.constexpr = WIDE > 1 and DTYPE != tl.float32
    EACH: tl.constexpr = WIDE // 2 if PAIRED else WIDE
    PIECES: tl.constexpr = BLOCK_V // (LANES * WIDE)
    pieces, lanes = tl.arange(0, PIECES)[:, None, None], tl.arange(0, LANES)[None, :, None]
    offs_v = (pieces * LANES + lanes) * WIDE + tl.arange(0, WIDE)[None, None, :]
    offs_u = (pieces * LANES + lanes) * EACH + tl.arange(0, EACH)[None, None, :]
    # Blocks before `begin` are read in each pass, without a mask. After them come the blocks that
    # may be held in registers, the last of which contains the end of the row.
    begin = 0 if HELD else tl.multiple_of(V - V % BLOCK_V, BLOCK_V)
    BLOCKS: tl.constexpr = HELD if HELD else 1
    held = ()
    if HAS_NORM:
        m = tl.load(Norm + pid_n)
        log_d = tl.load(Norm + N + pid_n)
        inv_d = _exp(-log_d)
    else:
        z_y = x_y * rate
        base = tl.where(tl.abs(z_y) < float("inf"), z_y, 0.0)  # subtracted, to sum small numbers
        top = tl.full([LANES], LOWEST, tl.float32)
        before = top  # maximum of the blocks before the target's
        part = tl.zeros_like(top)  # d of a thread's own logits, relative to its own maximum
        total, plogp = part, part
        for start in range(0, begin, BLOCK_V):
            u = _load(Logits, start, offs_u, v_padded, False, PAIRED)
            x = _logits(u, True, to_cap, DTYPE, False, HAS_SOFTCAP)
            top, part, total, plogp = _online(
                x, rate, True, top, part, total, plogp, base, False, HAS_SMOOTHING, HAS_METRICS
            )
            if HAS_METRICS:
                before = tl.where(start + BLOCK_V <= column, top, before)
        for i in tl.static_range(BLOCKS):
            held += (_load(Logits, begin + i * BLOCK_V, offs_u, v_padded, i == BLOCKS - 1, PAIRED),)
        for i in tl.static_range(BLOCKS):
            at = begin + i * BLOCK_V + offs_v
            x = _logits(held[i], at < V, to_cap, DTYPE, i == BLOCKS - 1, HAS_SOFTCAP)
            top, part, total, plogp = _online(
                x, rate, at < V, top, part, total, plogp, base, i == BLOCKS - 1, HAS_SMOOTHING,
                HAS_METRICS,
            )  # fmt: skip
            if HAS_METRICS:
                before = tl.where(begin + (i + 1) * BLOCK_V <= column, top, before)
        m = tl.max(top, 0)
        shrink = _exp(tl.maximum(top - m, -1000.0))
        d = masked_sum(part * shrink, part != 0.0)
        inv_d = tl.div_rn(1.0, d)
        log_d = tl.log(d)
        ce = log_d - (z_y - m)  # (lse - m) - (z_y - m): subtracts small numbers, not large ones
        if HAS_SMOOTHING:
            smooth = log_d - ((base - m) + tl.sum(total, 0) / V)
            ce = (1.0 - smoothing) * ce + smoothing * smooth
        ce = tl.where(inside, ce, float("nan"))
        Terms += pid_n
        tl.store(Terms, tl.where(kept, ce, 0.0))
        tl.store(Norm + pid_n, m)
        tl.store(Norm + N + pid_n, log_d)
        if HAS_METRICS:
            # The first of equal maxima is the prediction. The target's block is read again, because
            # comparing every column in the first pass would cost more than the rest of that pass.
            start = tl.multiple_of(column - column % BLOCK_V, BLOCK_V)
            u = _load(Logits, start, offs_u, v_padded, True, PAIRED)
            x = _logits(u, start + offs_v < column, to_cap, DTYPE, True, HAS_SOFTCAP)
            ahead = tl.max(tl.maximum(before, tl.max(tl.max(x, 2), 0) * rate), 0)
            tl.store(Terms + N + N + N, tl.where((m > z_y) | (ahead >= z_y), 0.0, 1.0))
            moved = tl.where(part > 0.0, (top - m) * part, 0.0)
            plogp = masked_sum(shrink * (plogp + moved), part != 0.0)
            tl.store(Terms + N + N + N + N, log_d - plogp * inv_d)
    lse = m + log_d

    if HAS_SAFETY:
        z_s = x_s * rate
        if HAS_SAFETY_LOGITS:
            z_s = tl.load(SafetyLogits + pid_n * stride_safety_n + offs_k, mask=mask_k, other=0.0)
        r = tl.load(Ref + pid_n * stride_ref_n + offs_k, mask=mask_k, other=0.0)
        a = tl.load(IdWeights + offs_k, mask=mask_k, other=0.0)
        phi, pull, drift = penalty(z_s, r, a, lse, mask_k, inv_k, temperature, delta, KIND)
        if not HAS_NORM:
            tl.store(Terms + N, phi)
            # Compare bit patterns, which order floats >= 0 and put NaN above inf: a float maximum
            # skips NaN, and would report a broken row as a healthy one.
            worst = tl.max(tl.abs(drift).to(tl.int32, bitcast=True), 0)
            tl.store(Terms + N + N, worst.to(tl.float32, bitcast=True))
    elif not HAS_NORM:
        tl.store(Terms + N, 0.0)
        tl.store(Terms + N + N, 0.0)

    if HAS_GRAD:
        Grad += pid_n * stride_grad_n
        inv_v = 1.0 / V
        ce_scale = tl.load(CeScale + pid_n)
        takes_ce = ce_scale != 0.0
        ce_scale = tl.where(inside | (kept == 0), ce_scale, float("nan"))
        extra = 0.0  # from the z-loss and a penalty on log-probabilities, times the softmax
        if HAS_Z_LOSS:
            extra = tl.where(takes_ce, ce_scale * (2.0 * z_loss_weight * lse), 0.0)
        if HAS_SAFETY:
            penalty_scale = tl.load(PenaltyScale + pid_n)
            pull = tl.where(penalty_scale != 0.0, penalty_scale * pull, 0.0)
            if KIND == "logprob" or KIND == "coarse_kl":
                extra -= tl.sum(pull, 0)
            du_s = _column(
                x_s, s == y, rate, m, inv_d, ce_scale, takes_ce, extra, smoothing, inv_v,
                _slope(x_s, logit_scale, HAS_SOFTCAP),
            )  # fmt: skip
            x_fine = z_s
            if HAS_SOFTCAP:
                x_fine = z_s / softcap
            slope_s = _slope(x_fine, logit_scale, HAS_SOFTCAP)
            du_s += tl.where(pull != 0.0, pull * slope_s, 0.0)
            du_s = du_s.to(DTYPE)
            if HAS_STASH:
                tl.store(Stash + pid_n * (K + 1) + offs_k, du_s, mask=mask_k)
        du_y = _column(
            x_y, True, rate, m, inv_d, ce_scale, takes_ce, extra, smoothing, inv_v,
            _slope(x_y, logit_scale, HAS_SOFTCAP),
        )  # fmt: skip
        du_y = du_y.to(DTYPE)
        if HAS_STASH:
            tl.store(Stash + pid_n * (K + 1) + K, du_y)
        takes = takes_ce | (extra != 0.0)
        of_ce = tl.where(takes_ce, ce_scale * logit_scale, 0.0)
        flat = of_ce * (smoothing * inv_v)
        factor = (of_ce + extra * logit_scale) * inv_d
        tl.debug_barrier()  # every warp has read its single columns
        if takes:
            for start in range(0, begin, BLOCK_V):
                u = _load(Logits, start, offs_u, v_padded, False, PAIRED)
                x = _logits(u, True, to_cap, DTYPE, False, HAS_SOFTCAP)
                _write(
                    Grad, start + offs_v, x, rate, m, factor, flat, V, v_padded, False,
                    HAS_SMOOTHING, HAS_SOFTCAP,
                )  # fmt: skip
            # Always 0, but the compiler cannot know. Otherwise it would keep the float32 values and
            # masks of the first pass, which take twice the registers, and spill.
            nothing = tl.minimum(K, 0)
            for i in tl.static_range(BLOCKS):
                at = begin + i * BLOCK_V + offs_v
                u = held[i] if HELD else _load(Logits, begin, offs_u, v_padded, True, PAIRED)
                if PAIRED:
                    u ^= nothing
                x = _logits(u, True, to_cap, DTYPE, False, HAS_SOFTCAP)
                _write(
                    Grad, at, x, rate, m, factor, flat, V + nothing, v_padded, i == BLOCKS - 1,
                    HAS_SMOOTHING, HAS_SOFTCAP,
                )  # fmt: skip
        else:  # not a product: inf and NaN of a masked row stay out
            for start in range(0, v_padded, BLOCK_V):
                tl.store(Grad + start + offs_v, 0.0, mask=start + offs_v < v_padded)
        if not HAS_STASH:
            tl.debug_barrier()  # other threads of this program wrote these columns just now
            tl.store(Grad + y, du_y, mask=inside)
            if HAS_SAFETY:
                tl.debug_barrier()  # y may be one of them
                tl.store(Grad + s, du_s, mask=mask_s)
