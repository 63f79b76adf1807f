"""Comparison of two sets of safety tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .safety_tokens import SafetyTokens


@dataclass(frozen=True)
class TokenComparison:
    """The result of `compare_tokens`.

    Args:
        both: ids in both sets, in the order of the first.
        only_first: ids only in the first set, in its order.
        only_second: ids only in the second set, in its order.
        jaccard: share of all ids that are in both, in [0, 1]; 1 for two empty sets.
        rank_correlation: Spearman's correlation, in [-1, 1], of the scores of the ids in both; None
            if a set has no scores, fewer than two ids are in both, or all scores of one are equal.
    """

    both: tuple[int, ...]
    only_first: tuple[int, ...]
    only_second: tuple[int, ...]
    jaccard: float
    rank_correlation: float | None


def compare_tokens(first: SafetyTokens, second: SafetyTokens) -> TokenComparison:
    """Compare two sets of safety tokens of one tokenizer.

    With A and B the two sets of ids, r and s the ranks of the common ids by either score (equal
    scores share the mean of their ranks):

        jaccard          = |A and B| / |A or B|
        rank_correlation = cov(r, s) / sqrt(var(r) * var(s))

    Args:
        first: one set.
        second: the other.

    Returns:
        The TokenComparison.

    Raises:
        ValueError: they belong to different tokenizers, so that an id means different tokens.

    Notes:
        A set made from bare ids, without a tokenizer, is compared without this check.

    References:
        Spearman 1904, Am. J. Psychol. 15(1), 72-101.

    Examples:
        >>> found = compare_tokens(SafetyTokens(ids=[3, 1]), SafetyTokens(ids=[1, 2]))
        >>> found.both, found.only_second, round(found.jaccard, 2)
        ((1,), (2,), 0.33)
    """
    for name in ("tokenizer_hash", "vocab_size"):
        one, other = getattr(first, name), getattr(second, name)
        if None not in (one, other) and one != other:
            raise ValueError(
                "`second` must be of the tokenizer of `first`, or its ids mean other tokens; got "
                f"{name} {str(other)[:12]} instead of {str(one)[:12]}"
            )
    ids, others = first.ids.tolist(), second.ids.tolist()
    both = [token for token in ids if token in set(others)]
    union = len(ids) + len(others) - len(both)
    correlation = None
    if first.scores is not None and second.scores is not None:
        by_id = [
            dict(zip(tokens.ids.tolist(), tokens.scores or (), strict=True))
            for tokens in (first, second)
        ]
        correlation = _spearman(*([scores[token] for token in both] for scores in by_id))
    return TokenComparison(
        tuple(both),
        tuple(token for token in ids if token not in set(both)),
        tuple(token for token in others if token not in set(both)),
        len(both) / union if union else 1.0,
        correlation,
    )


def _spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    r, s = _ranks(first), _ranks(second)
    mean = (len(r) - 1) / 2
    spread = math.sqrt(sum((a - mean) ** 2 for a in r) * sum((b - mean) ** 2 for b in s))
    if spread == 0:
        return None
    return sum((a - mean) * (b - mean) for a, b in zip(r, s, strict=True)) / spread


def _ranks(values: Sequence[float]) -> list[float]:
    """Return each value's rank, from 0; equal values share the mean of their ranks."""
    ordered = sorted(values)
    first = {value: at for at, value in reversed(list(enumerate(ordered)))}
    return [first[value] + (ordered.count(value) - 1) / 2 for value in values]
