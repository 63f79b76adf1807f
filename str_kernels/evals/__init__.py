"""Measures of what fine-tuning did to a model: counts of refusals, drift of the safety logits."""

from .drift import DriftStatistics, drift_statistics
from .judge import UNJUDGED, HttpJudge, Judge, as_verdict, judged_counts
from .printable import as_markdown, printable
from .prompt_sets import PromptRow, data_digest, load_prompts, read_prompt_rows
from .refusals import (
    PairedComparison,
    RefusalCounts,
    count_refusals,
    counts_of,
    evaluate_refusals,
    evaluate_rules,
    holm_adjusted,
    mcnemar_exact,
    paired_comparison,
    paired_outcomes,
    wilson_interval,
)
from .rules import RULES, Outcome, classify_answer, classify_gcg, refusal_rule
from .thoughts import has_marks, opened_thought, without_thought

__all__ = [
    "RULES",
    "UNJUDGED",
    "DriftStatistics",
    "HttpJudge",
    "Judge",
    "Outcome",
    "PairedComparison",
    "PromptRow",
    "RefusalCounts",
    "as_markdown",
    "as_verdict",
    "classify_answer",
    "classify_gcg",
    "count_refusals",
    "counts_of",
    "data_digest",
    "drift_statistics",
    "evaluate_refusals",
    "evaluate_rules",
    "has_marks",
    "holm_adjusted",
    "judged_counts",
    "load_prompts",
    "mcnemar_exact",
    "opened_thought",
    "paired_comparison",
    "paired_outcomes",
    "printable",
    "read_prompt_rows",
    "refusal_rule",
    "wilson_interval",
    "without_thought",
]
