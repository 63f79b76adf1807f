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

from dataclasses import replace
from typing import NamedTuple

import torch
from cases import Case, Result, cap
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
    """Compare loss, ce, penalty and max_drift; each error is bounded by the sum of its rows' own.

    The sum of the rows' absolute errors of eager in the same dtype, not the error of eager's sum:
    that may cancel to nothing by chance, and would fail any other order of summation.
    """
    ce_bound, ce_size, penalty_bound, penalty_size = row_errors(case)
    weight = float(case.options["penalty"].weight)
    rows, exact = row_terms(case), row_terms(case.in_dtype(torch.float64))
    takes_part = safety_weights(case) != 0
    drift_error = (rows[2].double() - exact[2])[takes_part].abs()
    drift_size = exact[3][takes_part]
    largest = torch.zeros((), dtype=torch.float64)
    bounds = {
        "ce": (ce_bound, ce_size),
        "penalty": (penalty_bound, penalty_size),
        "loss": (ce_bound + weight * penalty_bound, ce_size + weight * penalty_size),
        "max_drift": (
            drift_error.amax() if drift_error.numel() else largest,
            drift_size.amax() if drift_size.numel() else largest,
        ),
    }
    accumulated = torch.promote_types(case.dtype, torch.float32)
    for name, (error, size) in bounds.items():
        mine, wanted = getattr(got.terms, name), getattr(truth.terms, name)
        assert (mine.dtype, mine.dim()) == (accumulated, 0), name
        bound = FACTOR * float(error) + floor_of(case.dtype) * float(size)
        difference = abs(float(mine) - float(wanted))
        if not difference <= bound:
            raise OutOfTolerance(
                f"{name}: {float(mine)!r} instead of {float(wanted)!r}; "
                f"{difference:.3g} > {bound:.3g}"
            )


class Sizes(NamedTuple):
    """How large the numbers are that a gradient is made of, where they exceed the gradient.

    Attributes:
        addend: the largest of what is subtracted (p_y - 1, z_S - r) or multiplied by 1 - (z/t)^2.
        logit: on the linear path, two standard deviations of the logits, which are products there.
        length: the number of terms of the sum that an element of the gradient is.
        absolute: for each element, the sum of its terms' absolute values.
        quadratic: for each element, the root of the sum of its terms' squares.
    """

    addend: float = 0.0
    logit: float | None = None
    length: int = 1
    absolute: Tensor | None = None
    quadratic: Tensor | None = None


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
    parts = {part: mask for part, mask in parts.items() if bool(mask.any())}
    largest = {part: float(truth[mask].abs().max()) for part, mask in parts.items()}
    eager = {part: float((same.double() - truth)[mask].abs().max()) for part, mask in parts.items()}
    for part, mask in parts.items():
        absolute = quadratic = largest[part]
        if sizes.absolute is not None and sizes.quadratic is not None:
            absolute = float(sizes.absolute[mask].max())
            quadratic = max(quadratic, float(sizes.quadratic[mask].max()))
        granted = max(eager[part], unavoidable(got.dtype, quadratic, sizes))
        bound = factor * granted + floor_of(got.dtype) * absolute
        difference = float((got.double() - truth)[mask].abs().max())  # NaN where got has one
        if not difference <= bound:
            raise OutOfTolerance(
                f"{what}, {part}: max |got - truth| is {difference:.3g} > {bound:.3g} "
                f"(largest {largest[part]:.3g}, eager's error {eager[part]:.3g})"
            )


def unavoidable(dtype: torch.dtype, size: float, sizes: Sizes) -> float:
    """Return the error that no implementation avoids, the largest of the following.

    A rounding of the result to its dtype, and on the linear path one of the logits' gradient before
    it. In float32: roundings of addends; of the logits where they are products (an error of u in a
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
        max(roundings * unit(dtype) * size, unit(wide) * max(inside * size, sizes.addend))
        + subnormal
    )


def sizes_of(case: Case, name: str) -> Sizes:
    """Return what the rule has to know of a leaf's gradient."""
    c, w = row_weights(case)
    magnitude = row_terms(case)[3]  # |z_S| + |r|, since they are subtracted
    penalty = case.options["penalty"]
    a = 1.0 if penalty.id_weights is None else float(penalty.id_weights.max())
    pull = w * float(penalty.weight) * 2 * a * torch.where(w != 0, magnitude, 0)
    pull = pull / max(1, 0 if case.ids is None else len(case.ids))
    addend = max((float(x.abs().max()) for x in (c, pull) if x.numel()), default=0.0)
    # d in [1, 2) and exp, and tanh with a cap, are good to one unit in the last place each, which
    # is two roundings.
    addend *= 6 if case.options["softcap"] else 4
    addend *= case.options["logit_scale"] * abs(case.upstream)
    if not case.linear:
        return Sizes(addend)

    wide = case.in_dtype(torch.float64)
    options = {key: value for key, value in wide.options.items() if key != "chunk_bytes"}
    logits = wide.raw_logits().detach()
    of_logits = replace(wide, leaves={"logits": logits}, options=options).run("eager")
    left = of_logits.grads["logits"]
    assert left is not None
    if name == "hidden":
        right = wide.leaves["linear_weight"]
    elif name == "linear_weight":
        left, right = left.t(), wide.leaves["hidden"]
    else:
        left, right = left.t(), left.new_ones(left.shape[0], 1)
    left, right = (x.nan_to_num(0.0, 0.0, 0.0) for x in (left, right))
    absolute, quadratic = left.abs() @ right.abs(), (left.square() @ right.square()).sqrt()
    if name == "linear_bias":
        absolute, quadratic = absolute.squeeze(1), quadratic.squeeze(1)
    finite = logits[logits.isfinite()]
    deviation = float(finite.square().mean().sqrt()) if finite.numel() else 0.0
    addend *= float(right.abs().max()) if right.numel() else 0.0
    return Sizes(addend, 2 * deviation, left.shape[1], absolute, quadratic)


def unit(dtype: torch.dtype) -> float:
    """Return the largest relative error of one rounding: 2^-24 for float32."""
    return torch.finfo(dtype).eps / 2


def floor_of(dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return FLOORS_FLOAT64 * unit(dtype)
    return FLOORS * unit(torch.float32)


def factor_of(case: Case, backend: str) -> float:
    interpreted = backend == "triton" and case.target.device.type == "cpu"
    return FACTOR_TRUNCATED if interpreted and case.dtype == torch.bfloat16 else FACTOR


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
    elif name in ("linear_weight", "linear_bias"):
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


def row_terms(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # each (N,)
    """Return ce, penalty, drift and the size |z_S| + |r| of each row, in the case's dtype.

    A third statement of the definition, beside eager and torch's cross_entropy; see test_ops.
    """
    wide = torch.promote_types(case.dtype, torch.float32)
    z = cap(case.raw_logits().to(wide), case.options)
    kept = case.target != case.options["ignore_index"]
    column = torch.where(kept, case.target, 0)[:, None]
    ce = torch.where(kept, z.logsumexp(1) - z.gather(1, column)[:, 0], 0)
    if case.ids is None or not case.ids.numel() or case.ref is None:
        return (ce, *torch.zeros(3, *ce.shape, dtype=wide, device=ce.device))
    if case.linear:  # the safety logits are a product of their own, in full precision
        z = cap(case.in_dtype(wide).raw_logits(), case.options)
    z_s, ref = z[:, case.ids], case.ref.to(wide).expand(z.shape[0], -1)
    a = case.options["penalty"].id_weights
    squares = (z_s - ref).square()
    penalty = (squares if a is None else squares * a).mean(1)
    drift = (z_s - ref).abs().amax(1)
    return ce, penalty, drift, (z_s.abs() + ref.abs()).amax(1)


def row_errors(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return sum |row error| and sum |row term| of ce, then of penalty, divided by the counts."""
    c, w = row_weights(case)
    found = []
    exact = row_terms(case.in_dtype(torch.float64))
    # What roundings that eager may have been spared make of a row: four of d >= 1, a sum, in
    # log d, and one of z_S and r in (z_S - r)^2.
    rounding = unit(torch.promote_types(case.dtype, torch.float32))
    spared = (torch.full_like(exact[0], 4 * rounding), rounding * 2 * exact[2] * exact[3])
    for weight, same, truth, least in zip(
        (c, w), row_terms(case)[:2], exact[:2], spared, strict=True
    ):
        taken = weight != 0  # other rows may hold inf and NaN
        error = torch.maximum((same.double() - truth).abs(), least)[taken]
        size = truth.abs()[taken]
        found += [(weight[taken] * error).sum(), (weight[taken] * size).sum()]
    return found[0], found[1], found[2], found[3]


def row_weights(case: Case) -> tuple[Tensor, Tensor]:
    """Return c keep / num_items and w / num_safety_items, (N,) float64 each."""
    options = case.options
    kept = (case.target != options["ignore_index"]).double()
    given = options.get("ce_row_weight")
    c = kept if given is None else torch.where(kept != 0, given.double(), 0)
    w = safety_weights(case).double()
    items, safety_items = options.get("num_items"), options.get("num_safety_items")
    if options["reduction"] == "sum":
        items = safety_items = 1
    items = float(kept.sum() if items is None else items)
    safety_items = float(w.sum() if safety_items is None else safety_items)
    return c / items if items else c * 0, w / safety_items if safety_items else w * 0
