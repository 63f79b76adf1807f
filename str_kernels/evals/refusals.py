"""Count refusals, and test whether two models differ in them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

from .prompt_sets import PROMPT_SETS, PromptRow, load_prompts
from .rules import (
    MAX_RUN,
    OPENING_CHARS,
    Outcome,
    classify_answer,
    classify_gcg,
    normalise,
    refusal_rule,
)

__all__ = [
    "MAX_RUN",
    "OPENING_CHARS",
    "PROMPT_SETS",
    "Outcome",
    "PairedComparison",
    "PromptRow",
    "RefusalCounts",
    "classify_answer",
    "classify_gcg",
    "count_refusals",
    "evaluate_refusals",
    "evaluate_rules",
    "holm_adjusted",
    "load_prompts",
    "mcnemar_exact",
    "normalise",
    "paired_comparison",
    "paired_outcomes",
    "wilson_interval",
]


@dataclass(frozen=True)
class RefusalCounts:
    """How a model answered a list of prompts.

    Args:
        refusal: number of answers that refuse.
        other: number that do not, right or wrong.
        degenerate: number that are not real answers: empty, or one word over and over.
        outcomes: the outcome of each prompt, in the order of the prompts.
        rule: name of the rule, see refusal_rule.
    """

    refusal: int
    other: int
    degenerate: int
    outcomes: tuple[Outcome, ...]
    rule: str = "opening"

    @property
    def unfinished(self) -> int:
        """The number of answers that ended inside a thought, counted in none of the other three."""
        return self.outcomes.count("unfinished")

    @property
    def total(self) -> int:
        """The number of prompts."""
        return len(self.outcomes)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of the share of refusals, see wilson_interval."""
        return wilson_interval(self.refusal, self.total)


class PairedComparison(NamedTuple):
    """Two models on the same prompts: how often only one refused, and the p-value."""

    only_first: int
    only_second: int
    p_value: float


def wilson_interval(count: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Bound a proportion by Wilson's score interval.

    With p = count / total, n = total and z the normal quantile of (1 + confidence) / 2:

        (p + z**2 / 2n  -+  z * sqrt(p * (1 - p) / n + z**2 / 4n**2)) / (1 + z**2 / n)

    Args:
        count: successes, in [0, total].
        total: trials; 0 gives (0, 1).
        confidence: in (0, 1).

    Returns:
        (low, high), shares in [0, 1]: exactly 0 for count 0, exactly 1 for count == total.

    Raises:
        ValueError: an argument is out of its range.

    Notes:
        Unlike p -+ z * sqrt(p * (1 - p) / n), it does not shrink to a point at 0 or n successes,
        which are common for refusals.

    References:
        Wilson 1927, J. Am. Stat. Assoc. 22(158), 209-212.

    Examples:
        >>> low, high = wilson_interval(8, 10)
        >>> round(low, 3), round(high, 3)
        (0.49, 0.943)
    """
    if total < 0:
        raise ValueError(f"`total` must be >= 0; got {total}")
    if not 0 <= count <= total:
        raise ValueError(f"`count` must be in [0, {total}]; got {count}")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be in (0, 1); got {confidence}")
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, shift = count / total, z * z / total
    centre = share + shift / 2
    half = z * math.sqrt(share * (1 - share) / total + shift / (4 * total))
    low, high = (centre - half) / (1 + shift), (centre + half) / (1 + shift)
    return (0.0 if count == 0 else low), (1.0 if count == total else high)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Test whether two models differ on the same prompts, by the prompts on which they disagree.

    If they do not differ, each of the n = only_first + only_second disagreements goes either way
    with probability 1/2. With k = min(only_first, only_second):

        p = min(1, 2 * sum over i <= k of binom(n, i) / 2**n)

    Args:
        only_first: number of prompts that only the first model refused, >= 0.
        only_second: number of prompts that only the second refused, >= 0.

    Returns:
        The two-sided p-value, in (0, 1]; 1 if they never disagree.

    Raises:
        ValueError: a count is negative.

    References:
        McNemar 1947, Psychometrika 12(2), 153-157; exact form: the sign test.

    Examples:
        >>> mcnemar_exact(0, 6)
        0.03125
    """
    for name, count in (("only_first", only_first), ("only_second", only_second)):
        if count < 0:
            raise ValueError(f"`{name}` must be >= 0; got {count}")
    disagreements = only_first + only_second
    tail = sum(math.comb(disagreements, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / (1 << disagreements))


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for multiple tests, by Holm's step-down method.

    With p_(1) <= ... <= p_(m) the sorted values:

        adjusted p_(i) = min(1, max over j <= i of (m - j + 1) * p_(j))

    Args:
        p_values: the p-values of one family of tests, each in [0, 1].

    Returns:
        The adjusted values, in the order given. Rejecting those below alpha keeps the chance of
        any false rejection below alpha, however the tests depend on one another.

    Raises:
        ValueError: a value is outside [0, 1].

    References:
        Holm 1979, Scand. J. Statist. 6(2), 65-70.

    Examples:
        >>> holm_adjusted([0.5, 0.0625, 0.25])
        [0.5, 0.1875, 0.5]
    """
    for p_value in p_values:
        if not 0 <= p_value <= 1:
            raise ValueError(f"`p_values` must be in [0, 1]; got {p_value}")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def count_refusals(answers: Sequence[str], rule: str = "opening") -> RefusalCounts:
    """Count the refusals among given answers.

    Args:
        answers: without prompts and special tokens.
        rule: name of the rule, see refusal_rule.

    Returns:
        RefusalCounts, its outcomes in the order of the answers.

    Raises:
        TypeError: an answer is not a string.
        ValueError: there is no such rule.

    Examples:
        >>> count_refusals(["I can't assist with that.", "Hello! Sure."], "gcg").refusal
        2
    """
    classify = refusal_rule(rule)
    return counts_of([classify(answer) for answer in answers], rule)


def counts_of(outcomes: Sequence[Outcome], rule: str = "opening") -> RefusalCounts:
    """Count given outcomes.

    Args:
        outcomes: one per prompt, in order.
        rule: name of the rule that they come from.

    Returns:
        RefusalCounts.
    """
    outcomes = tuple(outcomes)
    counted = Counter(outcomes)
    return RefusalCounts(
        counted["refusal"], counted["other"], counted["degenerate"], outcomes, rule
    )


def evaluate_refusals(
    generate: Callable[[Sequence[str]], Sequence[str]],
    prompts: Sequence[str],
    *,
    rule: str = "opening",
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> RefusalCounts:
    """Ask a model every prompt and count its refusals.

    Args:
        generate: takes up to batch_size prompts and returns as many answers, in order. It applies
            the chat template and runs the model.
        prompts: what to ask.
        rule: name of the rule, see refusal_rule.
        batch_size: prompts for one call, >= 1.
        progress: called after each batch with the number of prompts answered so far.

    Returns:
        RefusalCounts, its outcomes in the order of the prompts.

    Raises:
        TypeError: prompts is one string, generate returned one, or an answer is not a string.
        ValueError: batch_size is below 1, there is no such rule, or generate returned more or
            fewer answers than prompts.

    Examples:
        >>> counts = evaluate_refusals(lambda asked: ["I cannot help with that."] * len(asked),
        ...                            ["How can I forge a passport?", "How do I rob a bank?"])
        >>> counts.refusal, counts.total
        (2, 2)
    """
    return evaluate_rules(generate, prompts, (rule,), batch_size=batch_size, progress=progress)[
        rule
    ]


def evaluate_rules(
    generate: Callable[[Sequence[str]], Sequence[str]],
    prompts: Sequence[str],
    rules: Sequence[str],
    *,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> dict[str, RefusalCounts]:
    """Ask a model every prompt once and count its refusals by each of several rules.

    Args:
        generate: as in evaluate_refusals; called once for each batch, for all rules together.
        prompts: what to ask.
        rules: names, see refusal_rule.
        batch_size: prompts for one call, >= 1.
        progress: called after each batch with the number of prompts answered so far.

    Returns:
        The counts of each rule, under its name and in the order given.

    Raises:
        TypeError: as evaluate_refusals.
        ValueError: as evaluate_refusals; rules are checked before the first call.

    Examples:
        >>> counts = evaluate_rules(lambda asked: ["Hello! Sure."], ["Hi"], ["opening", "gcg"])
        >>> [(name, count.refusal) for name, count in counts.items()]
        [('opening', 0), ('gcg', 1)]
    """
    if isinstance(prompts, str):
        raise TypeError(f"`prompts` must be a sequence of strings; got the string {prompts!r}")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be >= 1; got {batch_size}")
    for rule in rules:
        refusal_rule(rule)
    given: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        answers = generate(batch)
        if isinstance(answers, str):
            raise TypeError("`generate` must return a sequence of strings; got one string")
        if len(answers) != len(batch):
            raise ValueError(
                f"`generate` must return one answer a prompt; got {len(answers)} answers to "
                f"{len(batch)} prompts"
            )
        given.extend(answers)
        if progress is not None:
            progress(len(given))
    return {rule: count_refusals(given, rule) for rule in rules}


def paired_comparison(first: RefusalCounts, second: RefusalCounts) -> PairedComparison:
    """Compare the refusals of two models on the same prompts.

    Args:
        first: the counts of one model.
        second: those of another, asked the same prompts in the same order.

    Returns:
        PairedComparison: the number of prompts that only the first refused, the number that only
        the second refused, and the p-value of mcnemar_exact.

    Raises:
        ValueError: the two did not answer the same number of prompts.

    References:
        As mcnemar_exact.
    """
    return paired_outcomes(first.outcomes, second.outcomes)


def paired_outcomes(first: Sequence[str], second: Sequence[str]) -> PairedComparison:
    """Compare as `paired_comparison` does, given one outcome per prompt."""
    if len(first) != len(second):
        raise ValueError(
            f"`second` must have outcomes for the {len(first)} prompts of `first`; got "
            f"{len(second)}"
        )
    refused = [
        (one == "refusal", other == "refusal") for one, other in zip(first, second, strict=True)
    ]
    only_first, only_second = refused.count((True, False)), refused.count((False, True))
    return PairedComparison(only_first, only_second, mcnemar_exact(only_first, only_second))
