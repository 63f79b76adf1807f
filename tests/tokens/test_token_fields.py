"""What a SafetyTokens is made of, and what is told apart by its fingerprint."""

from __future__ import annotations

import re

import pytest
from test_safety_tokens import WORDS, WordTokenizer

from str_kernels import SafetyTokens
from str_kernels.tokens.tokenizer import tokenizer_hash


def test_ids_with_a_tokenizer() -> None:
    tokenizer = WordTokenizer(WORDS)
    tokens = SafetyTokens.from_ids(tokenizer, [5, 2], source="mine", scores=[2, 1.5])
    assert tokens.pieces == (tokenizer.names[5], tokenizer.names[2]) and tokens.scores == (2, 1.5)
    assert (tokens.source, tokens.tokenizer_hash) == ("mine", tokenizer_hash(tokenizer))
    with pytest.raises(ValueError, match=r"^`ids` must be in \[0, 15\); got 15"):
        SafetyTokens.from_ids(tokenizer, [5, 15])
    with pytest.raises(ValueError, match="`scores` must have 2 entries; got 1"):
        SafetyTokens(ids=[3, 1], scores=[1.0])


def test_the_fingerprint_is_that_of_ids_order_and_tokenizer_alone() -> None:
    tokens = SafetyTokens(ids=[3, 1], tokenizer_hash="abc")
    same = SafetyTokens(
        ids=[3, 1], tokenizer_hash="abc", id_weights=[1, 2], source="x", scores=[0, 1]
    )
    assert re.fullmatch("[0-9a-f]{64}", tokens.fingerprint)
    assert same.fingerprint == tokens.fingerprint
    others = ([1, 3], "abc"), ([3], "abc"), ([3, 1], "abd"), ([3, 1], None), ([31], "abc")
    prints = {SafetyTokens(ids=ids, tokenizer_hash=name).fingerprint for ids, name in others}
    assert len(prints | {tokens.fingerprint}) == 6


def test_scores_are_numbers() -> None:
    assert SafetyTokens(ids=[3, 1], scores=[1, 0.5]).scores == (1.0, 0.5)
    for scores in (["1", "2"], [True, 1.0], [None, 1.0]):
        with pytest.raises(TypeError, match="`scores` must be numbers"):
            SafetyTokens(ids=[3, 1], scores=scores)
    with pytest.raises(ValueError, match="`scores` must be finite; got inf"):
        SafetyTokens(ids=[3, 1], scores=[1.0, float("inf")])
