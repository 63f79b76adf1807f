"""`str-kernels finetune`: its options, its run, and the files it writes."""

from __future__ import annotations

from .options import read_options, short_names
from .run import Stopped, dry_run, finetune, is_main

__all__ = [
    "Stopped",
    "dry_run",
    "finetune",
    "is_main",
    "read_options",
    "short_names",
]
