"""The options of an evaluation, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...evals import refusal_rule

KEPT_TOKENS = 12  # of an answer that is kept or shown: too short to be of harmful use
_LONGEST = 8192  # maximum of `answer_tokens`; a thought may be long
KINDS = ("harmful", "harmless")


@dataclass(frozen=True)
class EvalOptions:
    """The model to evaluate, and what to measure.

    Args:
        model: "builtin", a folder or a hub id.
        adapter: a folder with adapter_config.json and adapter_model.safetensors.
        harmful: a named set, or a JSON Lines or CSV file, see load_prompts; rows whose "kind" is
            "harmless" are left out.
        harmless: likewise; rows whose "kind" is "harmful" are left out.
        task: JSON Lines of rows as for fine-tuning, whose questions are asked, and whose answers
            are the expected ones.
        text: a file of plain text, for the perplexity.
        safety_tokens: a file written by SafetyTokens.save; None means the built-in templates'.
        reference: the model that drift is measured from, named as `model`; None means the model
            without its adapter.
        rules: the rules that count refusals, see refusal_rule.
        answer_tokens: maximum length of an answer to be classified, tokens, in [1, 8192]. Only
            the first 12 are kept.
        positions: number of positions of an answer at which drift is measured, in [1, 12].
        batch_size: prompts at a time.
        limit: use only the first `limit` prompts of each kind and rows of the task; None uses all.
        max_length: tokens of a window of the text; the stride is half of it.
        dtype: of the weights, see load_model.
        column: of the prompt files, see load_prompts.
    """

    model: str
    adapter: Path | None = None
    harmful: str = "harmful_probes"
    harmless: str = "benign_probes"
    task: Path | None = None
    text: Path | None = None
    safety_tokens: Path | None = None
    reference: str | None = None
    rules: tuple[str, ...] = ("opening",)
    answer_tokens: int = 32
    positions: int = 8
    batch_size: int = 16
    limit: int | None = None
    max_length: int = 512
    dtype: str = "auto"
    column: str | None = None

    def __post_init__(self) -> None:
        """Check the range of each option."""
        for name, least, most in (
            ("answer_tokens", 1, _LONGEST),
            ("positions", 1, KEPT_TOKENS),
            ("batch_size", 1, None),
            ("limit", 1, None),
            ("max_length", 2, None),
        ):
            value = getattr(self, name)
            if value is not None and (value < least or (most is not None and value > most)):
                span = f">= {least}" if most is None else f"in [{least}, {most}]"
                raise ValueError(f"`{name}` must be {span}; got {value}")
        if not self.rules or len(set(self.rules)) < len(self.rules):
            raise ValueError(f"`rules` must be distinct and at least one; got {self.rules}")
        for rule in self.rules:
            refusal_rule(rule)
