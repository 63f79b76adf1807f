"""Safety tokens: the vocabulary ids whose logits are penalised, and how they are chosen."""

from __future__ import annotations

from .comparison import compare_tokens
from .safety_tokens import SafetyTokens
from .tokenizer import tokenizer_hash

__all__ = [
    "SafetyTokens",
    "compare_tokens",
    "tokenizer_hash",
]
