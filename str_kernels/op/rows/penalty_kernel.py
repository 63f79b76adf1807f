"""The penalties of one row inside a Triton kernel; `penalties` has them for PyTorch."""

import triton
import triton.language as tl

LEAST_REST = tl.constexpr(2.0**-13)  # as in penalties


@triton.jit
def masked_sum(x, mask):
    """Sum over threads, so that every thread gets bitwise the same result."""
    # Without the select, a product in x would be fused with the first addition, and threads would
    # round differently; all of them store their result to the same address.
    return tl.sum(tl.where(mask, x, 0.0), 0)


@triton.jit
def penalty(z_s, r, a, lse, mask_k, inv_k, temperature, delta, KIND: tl.constexpr):
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
        # tl.where keeps NaN, tl.maximum would not
        is_free = rest > LEAST_REST
        rest = tl.where(rest < LEAST_REST, LEAST_REST, rest)
        ref_rest = tl.where(ref_rest < LEAST_REST, LEAST_REST, ref_rest)
        gap = tl.where(q == 0.0, 0.0, -q * drift)
        phi = masked_sum(a * (gap + (p - q)), mask_k)
        ratio = tl.div_rn(ref_rest, rest)  # exactly 1 if equal; a GPU's `/` may be off by 2^-22
        phi += ref_rest * tl.log(ratio) + (rest - ref_rest)
        slope = a * (p - q) + p * tl.where(is_free, ratio - 1.0, 0.0)
    else:
        a = a * inv_k
        # tl.where keeps NaN, tl.minimum and tl.maximum would not
        if KIND == "huber":
            x = tl.where(drift > delta, delta, tl.where(drift < -delta, -delta, drift))
            phi = masked_sum(a * x * (drift - 0.5 * x), mask_k)
            slope = a * x
        else:
            x = drift
            if KIND == "hinge":
                x = tl.where(drift > 0.0, 0.0, drift)
            if KIND == "centered":
                x = tl.where(
                    mask_k, drift - masked_sum(a * drift, mask_k) / masked_sum(a, mask_k), 0.0
                )
            phi = masked_sum(a * x * x, mask_k)
            slope = 2.0 * a * x
    return phi, slope, drift
