"""Measures of what fine-tuning did to a model: refusals counted, drift of the safety logits."""

from .drift import DriftStatistics, drift_statistics
from .prompt_sets import PromptRow, load_prompts
from .refusals import (
    PairedComparison,
    RefusalCounts,
    count_refusals,
    evaluate_refusals,
    evaluate_rules,
    holm_adjusted,
    mcnemar_exact,
    paired_comparison,
    wilson_interval,
)
from .rules import RULES, Outcome, classify_answer, classify_gcg, refusal_rule

__all__ = [
    "RULES",
    "DriftStatistics",
    "Outcome",
    "PairedComparison",
    "PromptRow",
    "RefusalCounts",
    "classify_answer",
    "classify_gcg",
    "count_refusals",
    "drift_statistics",
    "evaluate_refusals",
    "evaluate_rules",
    "holm_adjusted",
    "load_prompts",
    "mcnemar_exact",
    "paired_comparison",
    "refusal_rule",
    "wilson_interval",
]
