"""The reference's safety logits on disk: computed once from a model and data, read by attach()."""

from __future__ import annotations

from .building import build_cache, verify_cache_of
from .reading import given_reference

__all__ = [
    "build_cache",
    "given_reference",
    "verify_cache_of",
]
