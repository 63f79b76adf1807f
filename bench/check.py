"""Check a provider's loss and gradients against the loss written by hand, in float32."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .inputs import Inputs
from .steps.providers import Provider, by_hand, missing
from .steps.timing import one_line

ROWS = 256  # that are compared: several of our chunks at V = 49,152 on a CPU

# bfloat16 rounds dZ, then dX: each 2^-9 of the largest entries, and sums of them
LIMITS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Verdict(NamedTuple):
    """What the check found.

    Attributes:
        status: "right", "wrong", "failed" or "absent".
        why: the reason, if there is one; for a right provider, the warning it gave.
        gradient_error: the largest difference from the truth, over the truth's largest entry.
    """

    status: str
    why: str = ""
    gradient_error: float | None = None


def check(
    listed: Iterable[Provider], inputs: Inputs, free_bytes: int | None = None
) -> dict[str, Verdict]:
    """Compare each provider's loss and gradients on the first rows.

    Args:
        listed: the providers to check.
        inputs: what they will be timed on.
        free_bytes: memory that each may take; None for no limit.

    Returns:
        Verdicts by name.
    """

    @functools.cache  # most providers have the same truth
    def truth(loss_of: Callable[[Inputs], Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return _run(loss_of, inputs.first(ROWS, torch.float32))

    return {p.name: _check(p, inputs, free_bytes, truth) for p in listed}


def _check(
    provider: Provider, inputs: Inputs, free_bytes: int | None, truth: Callable[..., Any]
) -> Verdict:
    if why := missing(provider, inputs):
        return Verdict("absent", why)
    needed = provider.bytes_per_logit * inputs.hidden.shape[0] * inputs.shape.vocab
    if free_bytes is not None and needed > free_bytes:
        return Verdict("absent", f"needs {needed / 1e9:.0f} GB, {free_bytes / 1e9:.0f} are free")
    part = inputs.first(ROWS)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss, grads = _run(provider.loss, part)
    except Exception as error:  # a crash in someone else's code is a result to report
        return Verdict("failed", one_line(error))
    exact, wanted = truth(provider.truth or by_hand)
    limit = LIMITS[inputs.hidden.dtype]
    # torch's max(), because Python's skips a NaN that is not the first
    errors = [_relative(g, w) for g, w in zip(grads, wanted, strict=True)]
    gradient_error = float(torch.stack(errors).max())
    off = abs(float(loss) - float(exact)) / abs(float(exact))
    if not (gradient_error <= limit and off <= limit):  # NaN is wrong too
        why = f"loss off by {off:.1e}, gradient by {gradient_error:.1e}, limit {limit:.0e}"
        return Verdict("wrong", why, gradient_error)
    # warnings for a library's users; deprecations are for its developers
    said = [str(w.message).split("\n")[0] for w in caught if issubclass(w.category, UserWarning)]
    return Verdict("right", said[0][:160] if said else "", gradient_error)


def _run(loss_of: Callable[[Inputs], Tensor], inputs: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    loss = loss_of(inputs)
    return loss.detach(), torch.autograd.grad(loss, inputs.leaves())


def _relative(got: Tensor, wanted: Tensor) -> Tensor:
    return (got.float() - wanted).abs().max() / wanted.abs().max()
