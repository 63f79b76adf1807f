"""The statistics beside SciPy's; Holm's adjustment, which SciPy lacks, beside his procedure."""

from __future__ import annotations

import random
from statistics import mean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from str_kernels.evals import holm_adjusted, mcnemar_exact, wilson_interval
from str_kernels.integrations.study.results import Found


@pytest.mark.parametrize("total", [1, 40, 2000])
@pytest.mark.parametrize("share", [0.0, 0.025, 0.3, 0.975, 1.0])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_the_wilson_interval_is_scipy_s(total: int, share: float, confidence: float) -> None:
    count = round(share * total)
    theirs = stats.binomtest(count, total).proportion_ci(confidence, method="wilson")
    assert wilson_interval(count, total, confidence) == pytest.approx(tuple(theirs), abs=1e-12)


def test_wilson_ends_and_the_empty_sample() -> None:
    assert wilson_interval(0, 40)[0] == 0.0
    assert wilson_interval(40, 40)[1] == 1.0
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, -1), "`total` must be >= 0; got -1"),
        ((-1, 3), r"`count` must be in \[0, 3\]; got -1"),
        ((4, 3), r"`count` must be in \[0, 3\]; got 4"),
        ((1, 3, 1.0), r"`confidence` must be in \(0, 1\); got 1.0"),
        ((1, 3, 0.0), r"`confidence` must be in \(0, 1\); got 0.0"),
    ],
)
def test_wilson_refuses(arguments: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wilson_interval(*arguments)


@pytest.mark.parametrize(
    ("only_first", "only_second"), [(1, 0), (2, 5), (4, 4), (9, 1), (0, 30), (900, 1100)]
)
def test_mcnemar_is_scipy_s_sign_test(only_first: int, only_second: int) -> None:
    theirs = stats.binomtest(only_first, only_first + only_second).pvalue
    assert mcnemar_exact(only_first, only_second) == pytest.approx(theirs, rel=1e-9)
    assert mcnemar_exact(only_second, only_first) == mcnemar_exact(only_first, only_second)


def test_mcnemar_takes_no_disagreement_and_no_negative_counts() -> None:
    assert mcnemar_exact(0, 0) == 1.0
    with pytest.raises(ValueError, match="`only_second` must be >= 0; got -1"):
        mcnemar_exact(1, -1)


def rejected_by_holm(p_values: list[float], alpha: float) -> set[int]:
    """Holm 1979: from the smallest p on, stop at the first that is above alpha / those left."""
    rejected: set[int] = set()
    for place in sorted(range(len(p_values)), key=p_values.__getitem__):
        if p_values[place] > alpha / (len(p_values) - len(rejected)):
            break
        rejected.add(place)
    return rejected


@pytest.mark.parametrize("count", [1, 2, 7])
def test_adjusted_below_alpha_is_what_holm_rejects_at_alpha(
    count: int, rng: torch.Generator
) -> None:
    for _ in range(200):
        # cubed: most are small, so that between none and all are rejected
        p_values = (torch.rand(count, generator=rng, dtype=torch.float64) ** 3).tolist()
        for alpha in (0.01, 0.05, 0.2, 0.6):
            below = {i for i, p in enumerate(holm_adjusted(p_values)) if p <= alpha}
            assert below == rejected_by_holm(p_values, alpha)


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([], []),
        ([0.03], [0.03]),
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.9, 0.9], [1.0, 1.0]),
        ([0.02, 0.001, 0.02, 0.5], [0.06, 0.004, 0.06, 0.5]),
    ],
)
def test_holm(p_values: list[float], adjusted: list[float]) -> None:
    assert holm_adjusted(p_values) == pytest.approx(adjusted)
    with pytest.raises(ValueError, match=r"`p_values` must be in \[0, 1\]; got 1.5"):
        holm_adjusted([*p_values, 1.5])


def test_the_interval_of_a_study_is_scipy_s_percentile_bootstrap() -> None:
    draw = random.Random(0)
    differences = [draw.gauss(10, 3) for _ in range(9)]
    rows: list[Any] = [
        SimpleNamespace(run=("sums", arm, seed), task="sums", arm=arm, seed=seed, right=right)
        for seed, difference in enumerate(differences)
        for arm, right in (("first", difference), ("second", 0.0))
    ]
    ours = Found(rows).difference("sums", "first", "second", lambda row: row.right)
    theirs = stats.bootstrap(
        (differences,), np.mean, n_resamples=10_000, method="percentile", rng=0
    ).confidence_interval
    assert ours is not None and ours.value == pytest.approx(mean(differences))
    # An end is the 2.5 % quantile of 10,000 draws: 0.03 standard errors of the mean of noise in
    # each of the two. The next of the usual levels, 90 %, has its ends 0.3 of them inside.
    noise = 0.15 * stats.sem(differences)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), abs=noise)
