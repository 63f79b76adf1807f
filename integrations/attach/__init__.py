"""attach(model, ...): the loss in a model's own forward; its options as one object."""

from __future__ import annotations

from .hook import SafetyHandle, attach
from .settings import KEYWORDS, AttachOptions, keywords_of, tokens_of

__all__ = [
    "KEYWORDS",
    "AttachOptions",
    "SafetyHandle",
    "attach",
    "keywords_of",
    "tokens_of",
]
