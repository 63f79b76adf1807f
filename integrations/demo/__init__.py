"""`str-kernels demo`: teach a small model to refuse, fine-tune it, and count its refusals."""

from __future__ import annotations

from .data import REFUSALS, is_right, sums
from .figure import draw_comparison
from .run import FULL, QUICK, run_demo
from .steps import MAX_LENGTH, DemoPlan, load, teach
from .training import TrainingOptions, train_lora

__all__ = [
    "FULL",
    "MAX_LENGTH",
    "QUICK",
    "REFUSALS",
    "DemoPlan",
    "TrainingOptions",
    "draw_comparison",
    "is_right",
    "load",
    "run_demo",
    "sums",
    "teach",
    "train_lora",
]
