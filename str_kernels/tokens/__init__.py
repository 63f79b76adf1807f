"""Which vocabulary ids the penalty looks at, and where they come from."""

from __future__ import annotations

from .comparison import compare_tokens
from .safety_tokens import SafetyTokens
from .tokenizer import tokenizer_hash

__all__ = [
    "SafetyTokens",
    "compare_tokens",
    "tokenizer_hash",
]
