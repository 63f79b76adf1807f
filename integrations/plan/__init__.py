"""`str-kernels plan`: the memory of a training step, counted without running it."""

from __future__ import annotations

from .planner import PlanOptions, plan_of, read_config

__all__ = [
    "PlanOptions",
    "plan_of",
    "read_config",
]
