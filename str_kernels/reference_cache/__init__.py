"""A store of the reference's safety logits on disk: its format, its reader and its writer."""

from __future__ import annotations

from .format import DTYPES, read_plan
from .reader import (
    DATED,
    KEYS,
    OF_A_DAY,
    PACKED,
    SHIFTED,
    CachedReference,
    LookUp,
    check_batch,
    read_timings,
    take_from,
    verify_cache,
)
from .writer import BuildReport, build_reference_cache

__all__ = [
    "DATED",
    "DTYPES",
    "KEYS",
    "OF_A_DAY",
    "PACKED",
    "SHIFTED",
    "BuildReport",
    "CachedReference",
    "LookUp",
    "build_reference_cache",
    "check_batch",
    "read_plan",
    "read_timings",
    "take_from",
    "verify_cache",
]
