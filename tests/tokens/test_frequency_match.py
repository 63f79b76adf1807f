"""The control that is matched in number and in frequency: its rule, and what comes of it."""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest
import torch
from test_safety_tokens import WordTokenizer

from str_kernels import SafetyTokens
from str_kernels.tokens.frequency_match import draw_matched


def zipf_corpus(tokenizer: WordTokenizer, draw: random.Random) -> list[list[int]]:
    """400 tokens, drawn, occur 20000 / rank times each; the others never."""
    ids = draw.sample(range(len(tokenizer)), 400)
    flat = [token for rank, token in enumerate(ids, start=1) for _ in range(20000 // rank)]
    return [flat[start : start + 1000] for start in range(0, len(flat), 1000)]


@pytest.fixture
def many() -> WordTokenizer:
    return WordTokenizer([f" w{i}" for i in range(600)])


def largest_gap(counts: Counter[int], one: SafetyTokens, other: SafetyTokens) -> int:
    """Return K times the Kolmogorov-Smirnov distance of the two distributions of frequencies."""
    first, second = ([counts[token] for token in tokens.ids.tolist()] for tokens in (one, other))
    return max(
        abs(sum(f <= level for f in first) - sum(f <= level for f in second))
        for level in {*first, *second}
    )


def test_a_matched_draw_has_the_frequencies_of_what_it_is_like(many) -> None:
    draw = random.Random(os.environ["STR_TEST_SEED"])
    corpus = zipf_corpus(many, draw)
    counts = Counter(token for row in corpus for token in row)
    common = [token for token, _ in counts.most_common() if token > 1]
    # every third of the 90 most frequent, which all differ in frequency, and ten that never occur
    never = [token for token in range(2, len(many)) if not counts[token]]
    like = SafetyTokens(ids=[*common[:90:3], *never[:10]], id_weights=torch.rand(40))
    excluded = SafetyTokens(ids=never[10:30])
    drawn = SafetyTokens.random(
        many, seed=draw.randrange(99), like=like, exclude=excluded, corpus=iter(corpus)
    )
    ids = drawn.ids.tolist()
    taken = {*like.ids.tolist(), *excluded.ids.tolist(), *many.all_special_ids}
    assert len(set(ids)) == len(like) and not set(ids) & taken
    assert torch.equal(drawn.id_weights, like.id_weights)
    total = sum(counts.values())
    assert drawn.scores == pytest.approx([1e6 * counts[token] / total for token in ids])
    # NEAREST is 4 and one in three is not free: the four nearest lie within 3 places on either
    # side, and a few more where a neighbour has taken some of them before.
    rank = {token: place for place, token in enumerate(common)}
    for wanted, got in zip(like.ids.tolist(), ids, strict=True):
        if counts[wanted]:
            assert abs(rank[wanted] - rank[got]) <= 8, (counts[wanted], counts[got])
        else:
            assert counts[got] == 0
    # and as distributions, where a draw of the same size without a corpus is far off
    assert largest_gap(counts, like, drawn) <= 3
    uniform = SafetyTokens.random(many, seed=draw.randrange(99), like=like)
    assert len(uniform) == len(like) and not set(uniform.ids.tolist()) & set(like.ids.tolist())
    assert largest_gap(counts, like, uniform) > 6


def test_a_matched_draw_is_its_seeds_and_never_the_same_for_all(many) -> None:
    corpus = zipf_corpus(many, random.Random(0))
    like = SafetyTokens(ids=range(2, 42))
    first, again, other = (
        SafetyTokens.random(many, 40, seed=seed, like=like, corpus=corpus).ids for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert (first != other).sum() > 20


def test_the_rule_of_the_matched_draw() -> None:
    counts = {1: 100, 2: 90, 3: 80, 4: 70, 5: 60, 6: 3, 7: 3, 8: 3, 9: 3, 10: 3, 20: 95, 21: 3}
    for seed in range(20):
        first, second, third = draw_matched(counts, [21, 20, 30], range(1, 13), seed=seed)
        assert second in {1, 2, 3, 4}  # the NEAREST four of 95
        assert first in {6, 7, 8, 9, 10}  # five are equally near to 3: any of them
        assert third in {11, 12, *range(6, 11)}  # it has two of its own, and next are those of 3
    everything = draw_matched(counts, list(range(1, 13)), list(range(20, 32)), seed=0)
    assert sorted(everything) == list(range(20, 32))
    firsts = {draw_matched(counts, [20], range(1, 13), seed=seed)[0] for seed in range(50)}
    assert firsts == {1, 2, 3, 4}
    # many equals in the fourth place do not crowd out the two that are nearer
    drawn = [draw_matched(counts, [30], range(1, 13), seed=seed)[0] for seed in range(400)]
    assert 0.4 < sum(token in {11, 12} for token in drawn) / len(drawn) < 0.6
    assert set(drawn) == {6, 7, 8, 9, 10, 11, 12}
    with pytest.raises(ValueError, match=r"`like` must have at most as many tokens .* 1; got 2"):
        draw_matched(counts, [1, 2], [3], seed=0)


def test_what_a_matched_draw_refuses(many) -> None:
    like = SafetyTokens.from_ids(many, [5, 6])
    for arguments, message in (
        ({"count": 3, "like": like}, "`count` must be that of `like`, 2; got 3"),
        ({}, r"`count` must be in \[1, 600\]; got None"),
        ({"count": 2, "corpus": [[3]]}, "`corpus` must come with `like`"),
        ({"like": like, "corpus": [[], []]}, "`corpus` must hold at least one id; got none"),
    ):
        with pytest.raises(ValueError, match=message):
            SafetyTokens.random(many, seed=0, **arguments)
    with pytest.raises(ValueError, match=r"^`tokenizer` must be the one"):
        SafetyTokens.random(WordTokenizer([" w"]), seed=0, like=like)
