"""Measures of what fine-tuning did to a model: refusals counted, drift of the safety logits."""

from .drift import DriftStatistics, drift_statistics
from .refusals import (
    Outcome,
    PairedComparison,
    PromptRow,
    RefusalCounts,
    classify_answer,
    evaluate_refusals,
    load_prompts,
    mcnemar_exact,
    paired_comparison,
    wilson_interval,
)

__all__ = [
    "DriftStatistics",
    "Outcome",
    "PairedComparison",
    "PromptRow",
    "RefusalCounts",
    "classify_answer",
    "drift_statistics",
    "evaluate_refusals",
    "load_prompts",
    "mcnemar_exact",
    "paired_comparison",
    "wilson_interval",
]
