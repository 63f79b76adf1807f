"""attach(model, ...) puts the safety loss into a model's own forward."""

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
