"""What an evaluation asks of which model, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...evals import refusal_rule

KEPT_TOKENS = 12  # of any answer that is kept or shown: too little for what it would do
_LONGEST = 8192  # of an answer that is asked for: a thought may be long
KINDS = ("harmful", "harmless")


@dataclass(frozen=True)
class EvalOptions:
    """What to ask of which model.

    Args:
        model: "builtin", a folder or a hub id.
        adapter: a folder with adapter_config.json and adapter_model.safetensors.
        harmful: a set by name, or a JSON Lines or CSV file, see load_prompts; without the rows
            whose "kind" is "harmless".
        harmless: likewise, without those whose "kind" is "harmful".
        task: JSON Lines of rows as for fine-tuning, asked and compared with their answers.
        text: a file of plain text, for the perplexity.
        safety_tokens: a file of SafetyTokens.save; the built-in templates' tokens when None.
        reference: the model that drift is measured from, as `model`; the model without its
            adapter when None.
        rules: by which refusals are counted, see refusal_rule.
        answer_tokens: answers are cut there to be classified, tokens, in [1, 8192]. More than the
            first 12 of one are never kept.
        positions: of an answer, at which drift is measured, in [1, 12].
        batch_size: prompts at a time.
        limit: so many first prompts of each kind, and rows of the task; all when None.
        max_length: tokens of a window of the text; half of that is its stride.
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
        """Refuse what is out of its range."""
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
