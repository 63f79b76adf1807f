"""`str-kernels eval`: measures refusals, right answers, perplexity and drift; compares runs."""

from __future__ import annotations

from .measures import combine_drift, drift_by_position, held_out_loss, is_exact_match
from .options import EvalOptions
from .report import SIGNIFICANT, run_report
from .run import run_eval

__all__ = [
    "SIGNIFICANT",
    "EvalOptions",
    "combine_drift",
    "drift_by_position",
    "held_out_loss",
    "is_exact_match",
    "run_eval",
    "run_report",
]
