"""The study: many ways to fine-tune the demo's taught model, with their refusals and costs."""

from __future__ import annotations

from .arms import PORTIONS
from .frontier import draw_study
from .report import write as write_report
from .run import FULL, QUICK, run_study

__all__ = [
    "FULL",
    "PORTIONS",
    "QUICK",
    "draw_study",
    "run_study",
    "write_report",
]
