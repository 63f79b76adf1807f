"""Two sets of safety tokens side by side."""

from __future__ import annotations

import random
import statistics

import pytest

from str_kernels import SafetyTokens
from str_kernels.tokens.comparison import compare_tokens


def test_what_is_in_both_and_what_in_one() -> None:
    found = compare_tokens(SafetyTokens(ids=[9, 4, 7, 1]), SafetyTokens(ids=[1, 2, 4]))
    assert (found.both, found.only_first, found.only_second) == ((4, 1), (9, 7), (2,))
    assert found.jaccard == pytest.approx(2 / 5) and found.rank_correlation is None
    same = compare_tokens(SafetyTokens(ids=[1, 2]), SafetyTokens(ids=[2, 1]))
    assert (same.jaccard, same.only_first, same.only_second) == (1.0, (), ())
    assert compare_tokens(SafetyTokens(ids=[1]), SafetyTokens(ids=[2])).jaccard == 0.0
    assert compare_tokens(SafetyTokens(ids=[]), SafetyTokens(ids=[])).jaccard == 1.0


def test_the_rank_correlation_is_that_of_the_common_ids() -> None:
    draw = random.Random(1)
    common = {token: (draw.random(), draw.random()) for token in range(20)}
    first = {**{token: pair[0] for token, pair in common.items()}, 90: 7.0}
    second = {**{token: pair[1] for token, pair in reversed(common.items())}, 91: -7.0}
    one, other = (SafetyTokens(ids=list(d), scores=list(d.values())) for d in (first, second))
    columns = zip(*common.values(), strict=True)
    ranks = [[sorted(column).index(value) for value in column] for column in map(list, columns)]
    expected = statistics.correlation(*ranks)
    assert abs(expected) < 0.99
    assert compare_tokens(one, other).rank_correlation == pytest.approx(expected)
    assert compare_tokens(one, one).rank_correlation == pytest.approx(1.0)


def test_equal_scores_share_their_rank_and_what_has_no_order_has_no_correlation() -> None:
    def correlation(first: list[float], second: list[float]) -> float | None:
        one, other = (SafetyTokens(ids=range(len(s)), scores=s) for s in (first, second))
        return compare_tokens(one, other).rank_correlation

    ranks = [1.5, 1.5, 3], [1, 2, 3]
    assert correlation([5, 5, 9], [0, 1, 8]) == pytest.approx(statistics.correlation(*ranks))
    assert correlation([1, 2], [2, 1]) == pytest.approx(-1.0)
    for without in (([1.0], [2.0]), ([1, 1], [1, 2]), ([], [])):
        assert correlation(*without) is None


def test_different_tokenizers_are_refused_and_unknown_ones_are_not() -> None:
    known = SafetyTokens(ids=[1, 2], tokenizer_hash="a" * 64, vocab_size=9)
    assert compare_tokens(known, SafetyTokens(ids=[1])).both == (1,)
    for other in (
        SafetyTokens(ids=[1], tokenizer_hash="b" * 64, vocab_size=9),
        SafetyTokens(ids=[1], vocab_size=8),
    ):
        with pytest.raises(ValueError, match=r"^`second` must be of the tokenizer of `first`"):
            compare_tokens(known, other)
