"""Safety tokens chosen by a model: those that open its refusals, and those it prefers in them."""

from __future__ import annotations

from .build import build_tokens
from .builders import from_contrast
from .opening_tokens import from_openings

__all__ = [
    "build_tokens",
    "from_contrast",
    "from_openings",
]
