"""The interface of a tokenizer, and a hash that identifies one."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Protocol

# Two tokenizers with the same vocabulary may still split text differently; this text shows it.
_PROBE_TEXT = "I'm sorry, but I can't help with that. 12 345 naïve Übung\n\tdef f(x): return x"


class Tokenizer(Protocol):
    """The part of a tokenizer's interface that is used; every Hugging Face tokenizer has it."""

    all_special_ids: list[int]

    def __len__(self) -> int:
        """Return the number of tokens, added ones included."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of a text."""
        ...

    def decode(self, token_ids: list[int]) -> Any:
        """Return the text of ids."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """Return every token's id."""
        ...


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Return a SHA-256 of the vocabulary, the special ids and the encoding of a probe text."""
    content = [
        sorted(tokenizer.get_vocab().items()),
        sorted(tokenizer.all_special_ids),
        tokenizer.encode(_PROBE_TEXT, add_special_tokens=False),
    ]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()
