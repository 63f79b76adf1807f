"""The one tolerance rule, used by every comparison.

    truth = eager in float64, on the same (already rounded) inputs
    max|got - truth| <= 2 max|eager in the same dtype - truth| + floor

judged apart for the target columns, the safety columns and the rest of a gradient, since each would
hide in the largest of the others. floor = 8 * 2^-24 * max|truth| of the part (for scalars, and for
products over V or N, of the sum of absolute terms): absolute floors fail correct code at large
losses and hide a lost term at small ones.

A part may hold a single number, and eager's error of it may be 0 by luck, which would bind everyone
else to it. So the error granted to eager is never less than the roundings it cannot avoid:
`unavoidable` lists them. test_mutants shows how small an error is still noticed.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from cases import ON_LOG_PROBS, Case, Result
from third_statement import Rows, coarse_of, pulls, row_terms
from torch import Tensor

FLOORS = 8
FLOORS_FLOAT64 = 64  # the truth is a float64 result too, and its own error is not in the rule
FACTOR = 2
# Triton's interpreter cuts float32 down to bfloat16 where a device rounds: twice the error.
FACTOR_TRUNCATED = 4


class OutOfTolerance(AssertionError):
    """A comparison failed by value: not a crash, not a wrong dtype."""


def assert_matches_truth(case: Case, got: Result, backend: str) -> None:
    """Compare terms and gradients of `case` run by `backend` with the truth."""
    truth = case.in_dtype(torch.float64).run("eager")
    same = case.run("eager")
    assert_terms_match(case, got, truth)
    for name, leaf in case.leaves.items():
        wanted, mine = truth.grads[name], got.grads[name]
        assert (mine is None) == (wanted is None), f"{name}: gradient {mine} instead of {wanted}"
        if mine is None or wanted is None:
            continue
        assert mine.dtype == leaf.dtype, name
        parts, sizes = parts_of(case, name), sizes_of(case, name)
        factor = factor_of(case, backend)
        compare(f"grad of {name}", mine, wanted, same.grads[name], parts, sizes, factor=factor)


def assert_terms_match(case: Case, got: Result, truth: Result) -> None:
    """Compare the terms, each of which is a sum over rows, a maximum, or one number per row.

    A sum's error is bounded by the sum of the rows' absolute errors of eager in the same dtype, not
    by the error of eager's sum: that may cancel to nothing by chance, and would fail any other
    order of summation. Rows one by one (reduction "none") are judged like a gradient: the largest
    error by eager's largest, relative to the largest term.
    """
    assert_no_row_is_right_by_mistake(case, got, truth)
    accumulated = torch.promote_types(case.dtype, torch.float32)
    each = case.options["reduction"] == "none"
    for name, (error, size) in row_errors(case).items():
        mine, wanted = getattr(got.terms, name), getattr(truth.terms, name)
        assert (mine is None) == (wanted is None), name
        if mine is None or wanted is None:
            continue
        shape = case.target.shape if each else ()
        assert (mine.dtype, mine.shape) == (accumulated, shape), name
        total = largest if each or name == "max_drift" else torch.sum
        bound = FACTOR * float(total(error)) + floor_of(case.dtype) * float(total(size))
        difference = float(largest((mine.double() - wanted.double()).abs().reshape(-1)))
        if not difference <= bound:
            raise OutOfTolerance(
                f"{name}: {mine.tolist()!r} instead of {wanted.tolist()!r}; "
                f"{difference:.3g} > {bound:.3g}"
            )


def assert_no_row_is_right_by_mistake(case: Case, got: Result, truth: Result) -> None:
    """Compare the accuracy: exactly, but for the rows whose two largest logits rounding may swap.

    On the logits path and without scale and cap nothing is rounded, and equal logits are equal.
    """
    mine, wanted = got.terms.token_accuracy, truth.terms.token_accuracy
    assert (mine is None) == (wanted is None), "token_accuracy"
    if mine is None or wanted is None:
        return
    assert mine.dtype == torch.promote_types(case.dtype, torch.float32)
    same, exact = row_terms(case), row_terms(case.in_dtype(torch.float64))
    rounding = unit(torch.promote_types(case.dtype, torch.float32))
    shift = 2 * (same.ahead.double() - exact.ahead).abs() + 4 * rounding * exact.top.abs()
    options = case.options
    if not case.linear and options["logit_scale"] == 1 and options["softcap"] is None:
        shift = torch.zeros_like(shift)
    in_doubt = (exact.ahead.abs() < shift).double() * counted_rows(case)
    # a quotient of two whole numbers: one rounding of the inverse count, one of the product
    rounded = 4 * rounding * float(wanted.abs().amax()) if wanted.numel() else 0.0
    if options["reduction"] == "none":
        wrong = ((mine.double() - wanted).abs() > rounded) & (in_doubt == 0)
    else:
        wrong = (mine.double() - wanted).abs() > in_doubt.sum() + rounded
    if bool(wrong.any()):
        raise OutOfTolerance(f"token_accuracy: {mine.tolist()} instead of {wanted.tolist()}")


def largest(values: Tensor) -> Tensor:
    return values.amax() if values.numel() else values.new_zeros(())


class Sizes(NamedTuple):
    """How large the numbers are that a gradient is made of, where they exceed the gradient.

    Attributes:
        addend: the largest of what is subtracted (p_y - 1, z_S - r) or multiplied by 1 - (z/t)^2.
        logit: on the linear path, two standard deviations of the logits, which are products there.
        length: the number of terms of the sum that an element of the gradient is.
        absolute: for each element, the sum of its terms' absolute values.
        quadratic: for each element, the root of the sum of its terms' squares.
        pulled: for each element, what comes of the safety logits' own product, absolute.
    """

    addend: float = 0.0
    logit: float | None = None
    length: int = 1
    absolute: Tensor | None = None
    quadratic: Tensor | None = None
    pulled: Tensor | None = None


def compare(
    what: str,
    got: Tensor,
    truth: Tensor,
    same: Tensor,
    parts: dict[str, Tensor],
    sizes: Sizes | None = None,
    *,
    factor: float = FACTOR,
) -> None:
    """Hold each part (a mask) of a tensor against the rule; `same` is eager in got's dtype."""
    sizes = sizes or Sizes()
    assert (got.dtype, got.shape) == (same.dtype, same.shape), what
    truth = truth.double()
    parts = {part: mask for part, mask in parts.items() if truth[mask].numel()}
    largest = {part: float(truth[mask].abs().max()) for part, mask in parts.items()}
    eager = {part: float((same.double() - truth)[mask].abs().max()) for part, mask in parts.items()}
    for part, mask in parts.items():
        absolute = quadratic = largest[part]
        if sizes.absolute is not None and sizes.quadratic is not None:
            absolute = float(sizes.absolute[mask].max())
            quadratic = max(quadratic, float(sizes.quadratic[mask].max()))
        pulled = 0.0 if sizes.pulled is None else float(sizes.pulled[mask].max())
        granted = max(eager[part], unavoidable(got.dtype, quadratic, sizes, pulled))
        bound = factor * granted + floor_of(got.dtype) * absolute
        difference = float((got.double() - truth)[mask].abs().max())  # NaN where got has one
        if not difference <= bound:
            raise OutOfTolerance(
                f"{what}, {part}: max |got - truth| is {difference:.3g} > {bound:.3g} "
                f"(largest {largest[part]:.3g}, eager's error {eager[part]:.3g})"
            )


def unavoidable(dtype: torch.dtype, size: float, sizes: Sizes, pulled: float = 0.0) -> float:
    """Return the error that no implementation avoids, the largest of the following.

    A rounding of the result to its dtype, and on the linear path one of the logits' gradient before
    it. (Eager adds two products there, each rounded to the dtype: that of the logits' gradient, and
    `pulled`, of the safety logits' own. In logprob they cancel, as far as the ids' softmax is near
    1. Eager's error is then one of its roundings of `pulled`, or 0 if they happen to be alike, and
    says nothing of what the rounding of the logits does to the difference of the two.)
    In float32: roundings of addends; of the logits where they are products (an error of u in a
    logit is a relative error of u in its probability); and of the partial sums of a product, whose
    order is the library's own, so that they add up like the root of their number. A rounding of the
    logits to bfloat16 or float16 is the same in eager and here, and is not granted again.
    """
    wide = torch.promote_types(dtype, torch.float32)
    roundings = 1.0 if sizes.logit is None else 2.0
    inside = max(sizes.length**0.5, 2.0 + (sizes.logit or 0.0)) if sizes.length > 1 else 1.0
    step = torch.finfo(dtype)
    subnormal = step.smallest_normal * step.eps / 2  # half of float16's last step below 6e-5
    return (
        max(
            roundings * unit(dtype) * max(size, pulled),
            unit(wide) * max(inside * size, sizes.addend),
        )
        + subnormal
    )


def sizes_of(case: Case, name: str) -> Sizes:
    """Return what the rule has to know of a leaf's gradient."""
    c, w = row_weights(case)
    terms = row_terms(case)
    penalty = case.options["penalty"]
    magnitude = torch.where(w != 0, terms.size, 0)  # |z_S| + |r|, since they are subtracted
    a = 1.0 if penalty.id_weights is None else float(penalty.id_weights.max())
    ids = max(1, 0 if case.ids is None else len(case.ids))
    pull = w * float(penalty.weight) * 2 * a * magnitude / ids
    if penalty.kind == "centered":  # another subtraction, of the mean
        pull = 2 * pull
    elif penalty.kind == "coarse_kl" and case.ids is not None and case.ref is not None:
        # each p and q with the relative error of an exponential's argument, in p - q, and all of
        # them in 1 - sum p, by which the rest's share is divided
        coarse = coarse_of(case)
        rests = (coarse.rest, coarse.ref_rest)
        of_rests = sum(torch.where(x > 2.0**-13, 1 / x, 0) for x in rests)  # the least has no error
        ratio = coarse.ref_rest / coarse.rest * (1 + of_rests)
        pull = w * float(penalty.weight) * (magnitude + 4) * (w != 0) * (a + ratio)
    elif penalty.kind in ON_LOG_PROBS:
        # Every column gets p_v times the sum of all pulls: the ids' own errors add up like the root
        # of their number, that of lse is the same for all of them.
        of_lse = w * float(penalty.weight) * 2 * a * torch.where(w != 0, terms.lse.abs(), 0)
        pull = pull * (1 + ids**0.5) + of_lse
    elif penalty.kind == "subset_kl":
        # T (s - q), each s and q with the relative error of an exponential's argument
        pull = w * float(penalty.weight) * (magnitude + 4 * penalty.temperature) * (w != 0)
    zeta = case.options["z_loss_weight"]
    if zeta:  # p_v times 1 + 2 zeta lse
        c = c * (1 + 2 * zeta * torch.where(c != 0, terms.lse.abs(), 0))
    upstream = abs(case.upstream)
    if case.row_upstream is not None:
        upstream = case.row_upstream.double().abs() * upstream
    addend = max((float((x.abs() * upstream).max()) for x in (c, pull) if x.numel()), default=0.0)
    # d in [1, 2) and exp are good to one unit in the last place each, which is two roundings, and
    # tanh with a cap to two: a GPU divides no better.
    addend *= 8 if case.options["softcap"] else 4
    addend *= case.options["logit_scale"]
    if not case.linear:
        return Sizes(addend)

    wide = case.in_dtype(torch.float64)
    logits = wide.raw_logits().detach()
    left = wide.from_logits(logits).run("eager").grads["logits"]
    assert left is not None
    pull = pulls(case, w * float(penalty.weight) * upstream)
    at_ids = torch.zeros_like(left)
    if pull.numel():
        at_ids[:, case.ids] = pull
    if name == "hidden":
        right = wide.leaves["linear_weight"]
    elif name == "low_rank_t":
        right = wide.leaves["low_rank_b"]
    else:  # a leaf with a row for each token
        left, at_ids = left.t(), at_ids.t()
        of_rows = {"linear_weight": "hidden", "low_rank_b": "low_rank_t"}
        bias = left.new_ones(left.shape[1], 1)
        right = wide.leaves[of_rows[name]] if name in of_rows else bias
    left, right, at_ids = (x.nan_to_num(0.0, 0.0, 0.0) for x in (left, right, at_ids))
    absolute, quadratic = left.abs() @ right.abs(), (left.square() @ right.square()).sqrt()
    pulled = (at_ids @ right).abs()
    if name == "linear_bias":
        absolute, quadratic, pulled = (x.squeeze(1) for x in (absolute, quadratic, pulled))
    finite = logits[logits.isfinite()]
    deviation = float(finite.square().mean().sqrt()) if finite.numel() else 0.0
    addend *= float(right.abs().max()) if right.numel() else 0.0
    return Sizes(addend, 2 * deviation, left.shape[1], absolute, quadratic, pulled)


def unit(dtype: torch.dtype) -> float:
    """Return the largest relative error of one rounding: 2^-24 for float32."""
    return torch.finfo(dtype).eps / 2


def floor_of(dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return FLOORS_FLOAT64 * unit(dtype)
    return FLOORS * unit(torch.float32)


def factor_of(case: Case, backend: str) -> float:
    cut_off = backend.startswith("triton") and interpreted() and case.dtype == torch.bfloat16
    return FACTOR_TRUNCATED if cut_off else FACTOR


def interpreted() -> bool:
    """Say whether Triton's kernels are: else they are compiled, for the GPU or to be executed."""
    return os.environ.get("TRITON_INTERPRET") == "1"  # conftest.py sees to it


def parts_of(case: Case, name: str) -> dict[str, Tensor]:
    """Split a leaf's gradient into target columns, safety columns and the rest (by masks)."""
    leaf = case.leaves[name]
    kept = case.target != case.options["ignore_index"]
    ids = case.target.new_empty(0) if case.ids is None else case.ids
    if name == "logits":
        target = torch.zeros(leaf.shape, dtype=torch.bool, device=leaf.device)
        target[kept, case.target[kept]] = True
        safety = torch.zeros_like(target)
        safety[:, ids] = True
    elif name in ("linear_weight", "linear_bias", "low_rank_b"):
        target = torch.zeros(leaf.shape[0], dtype=torch.bool, device=leaf.device)
        safety = torch.zeros_like(target)
        target[case.target[kept]] = True
        safety[ids] = True
    else:
        return {"all": torch.ones(leaf.shape, dtype=torch.bool, device=leaf.device)}
    return {"target": target, "safety": safety, "rest": ~(target | safety)}


def safety_weights(case: Case) -> Tensor:  # (N,)
    given = case.options.get("safety_row_weight")
    return (case.target != case.options["ignore_index"]).float() if given is None else given


def row_errors(case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    """Return of every term but the accuracy |row error| and |row term|, (N,), over the counts."""
    c, w = row_weights(case)
    same, exact = row_terms(case), row_terms(case.in_dtype(torch.float64))
    # What roundings that eager may have been spared make of a row:
    rounding = unit(torch.promote_types(case.dtype, torch.float32))
    # four of d >= 1, a sum, in log d, and in the entropy's two sums;
    spared_ce = torch.full_like(exact.ce, 4 * rounding)
    # of lse, which is m + log d, in lse^2;
    zeta = case.options["z_loss_weight"]
    spared_z = 2 * zeta * rounding * exact.lse.abs() * (4 + exact.lse.abs())

    def weighted(weight: Tensor, name: str, spared: Tensor) -> tuple[Tensor, Tensor]:
        weight = weight.abs()
        value, truth = getattr(same, name).double(), getattr(exact, name)
        error = weight * torch.maximum((value - truth).abs(), spared)
        # other rows may hold inf and NaN
        return torch.where(weight != 0, error, 0), torch.where(weight != 0, weight * truth.abs(), 0)

    ce = weighted(c, "ce", spared_ce)
    z_loss = weighted(c, "z_loss", spared_z)
    penalty = weighted(w, "penalty", rounding * spared_by_penalty(case, exact))
    factor = float(case.options["penalty"].weight)
    loss = tuple(x + y + factor * z for x, y, z in zip(ce, z_loss, penalty, strict=True))
    takes_part = (safety_weights(case) != 0).double()
    drift = weighted(takes_part, "drift", torch.zeros_like(exact.drift))
    return {
        "ce": ce,
        "penalty": penalty,
        "loss": (loss[0], loss[1]),
        # relative to what is subtracted, of which little may be left
        "max_drift": (drift[0], torch.where(takes_part != 0, exact.size, 0)),
        "entropy": weighted(counted_rows(case), "entropy", spared_ce),
    }


def spared_by_penalty(case: Case, exact: Rows) -> Tensor:  # (N,), in roundings
    """Return what one rounding of each of z_S and r (and lse) makes of a row's penalty at least."""
    penalty = case.options["penalty"]
    of_square = 2 * exact.drift * exact.size  # of (z_S - r)^2; the others' slopes are no larger
    if penalty.kind == "centered":  # the mean d, which is subtracted, is rounded as d is
        return 2 * of_square
    if penalty.kind == "coarse_kl" and case.ids is not None and case.ref is not None:
        # the slopes at each log p and log q, and a few roundings of each term of the sum
        p, q, rest, ref_rest, a = coarse_of(case)
        d = torch.where(q > 0, (q / p).log(), 0)
        gap = (ref_rest / rest).log().abs()[:, None]
        slopes = a * (p - q).abs() + p * (ref_rest / rest - 1).abs()[:, None]
        slopes = slopes + q * (a * d.abs() + gap)
        terms = (a * (q * d.abs() + p + q)).sum(1) + ref_rest * (gap[:, 0] + 1) + rest
        return slopes.sum(1) * (exact.size + 4) + 8 * terms
    if penalty.kind in ON_LOG_PROBS:  # and log d, as in the cross-entropy
        return of_square + 2 * exact.drift * 4
    if penalty.kind == "subset_kl":
        # T^2 sum q (log q - log s), of which nothing is left where q = s: the logarithms' own
        # errors, in T^2 times z/T, r/T and two log-sums of four roundings each
        return penalty.temperature * exact.size + 8 * penalty.temperature**2
    return of_square


def row_weights(case: Case) -> tuple[Tensor, Tensor]:
    """Return c keep / num_items and w / num_safety_items, (N,) float64 each."""
    options = case.options
    kept = (case.target != options["ignore_index"]).double()
    given = options.get("ce_row_weight")
    c = kept if given is None else torch.where(kept != 0, given.double(), 0)
    w = safety_weights(case).double()
    items, safety_items = counts(case)
    return c / items if items else c * 0, w / safety_items if safety_items else w * 0


def counted_rows(case: Case) -> Tensor:  # (N,) float64
    """Return what a row adds to the accuracy if it is right: keep / num_items."""
    c, _ = row_weights(case)
    items, _ = counts(case)
    return (c != 0).double() / items if items else c * 0


def counts(case: Case) -> tuple[float, float]:
    """Return num_items and num_safety_items."""
    options = case.options
    if options["reduction"] != "mean":
        return 1.0, 1.0
    kept = (case.target != options["ignore_index"]).sum()
    items, safety_items = options.get("num_items"), options.get("num_safety_items")
    items = float(kept if items is None else items)
    w = safety_weights(case).double().sum()
    return items, float(w if safety_items is None else safety_items)
