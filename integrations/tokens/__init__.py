"""Safety tokens chosen with a model: from its refusals, and from the openings of its answers."""

from __future__ import annotations

from .build import build_tokens
from .builders import from_contrast
from .opening_tokens import from_openings

__all__ = [
    "build_tokens",
    "from_contrast",
    "from_openings",
]
