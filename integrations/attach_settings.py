"""How to attach, as plain fields: what TRL's parser, Axolotl's YAML and others can fill in."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, cast, get_args

from ..contracts import Backend, PenaltyKind, SafetyPenalty
from ..reference_cache import CachedReference
from ..safety_tokens import SafetyTokens
from .anchors import AnchorPrompts


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class SafetySettings:
    """The fields that say which tokens are held, how, and at which anchors; see `attach`."""

    safety_weight: float = _option(0.1, "Weight of the penalty; 0 is plain fine-tuning.")
    safety_kind: str = _option("mse", f"Kind of the penalty: {', '.join(get_args(PenaltyKind))}.")
    safety_temperature: float = _option(1.0, "T of kind subset_kl.")
    safety_delta: float = _option(1.0, "Where kind huber turns straight, logits.")
    safety_tokens: str | None = _option(None, "A safety_tokens.json, instead of the templates.")
    safety_templates: str | None = _option(None, "A file of refusal templates, one a line.")
    safety_positions: str = _option(
        "response", "'response', 'all', or the first so many labels of each response."
    )
    safety_ref_every: int = _option(1, "Ask the reference in every n-th forward only.")
    safety_ref_tokens: int | None = _option(
        None, "The reference reads so many first tokens of each row only."
    )
    safety_path: str = _option("linear", "'linear' or 'logits', as in attach().")
    safety_chunk_bytes: int | None = _option(None, "Memory for one chunk's logits, bytes.")
    safety_backend: str = _option("auto", f"What makes the loss: {', '.join(get_args(Backend))}.")
    safety_cache: str | None = _option(
        None, "A folder made by `str-kernels cache build`, instead of the reference's passes."
    )
    safety_anchors: str | None = _option(
        None, "Prompts at which the model is held too: a JSONL file, or 'anchors'."
    )
    safety_anchors_per_step: int = _option(2, "Harmful anchors in each step.")
    safety_harmless_anchors_per_step: int = _option(0, "Harmless anchors in each step.")
    safety_anchor_weight: float = _option(1.0, "1: all anchors weigh as much as all labels.")

    def attach_options(self, tokenizer: Any, seed: int = 0) -> dict[str, Any]:
        """Return the keywords of `attach` that the fields stand for."""
        positions = str(self.safety_positions)
        options: dict[str, Any] = {
            "penalty": SafetyPenalty(
                self.safety_weight,
                cast(PenaltyKind, self.safety_kind),
                self.safety_temperature,
                self.safety_delta,
            ),
            "positions": int(positions) if positions.isdigit() else positions,
            "ref_every": self.safety_ref_every,
            "ref_tokens": self.safety_ref_tokens,
            "path": self.safety_path,
            "chunk_bytes": self.safety_chunk_bytes,
            "backend": self.safety_backend,
        }
        if self.safety_cache is not None:
            options["reference"] = CachedReference(self.safety_cache)
        if self.safety_anchors is not None:
            options["anchors"] = AnchorPrompts.from_prompts(
                tokenizer,
                self.safety_anchors,
                per_step=self.safety_anchors_per_step,
                harmless_per_step=self.safety_harmless_anchors_per_step,
                weight=self.safety_anchor_weight,
                seed=seed,
            )
        return options

    def tokens(self, tokenizer: Any) -> SafetyTokens:
        """Return the SafetyTokens that the fields stand for."""
        if self.safety_tokens is not None:
            return SafetyTokens.load(self.safety_tokens, tokenizer)
        return SafetyTokens.from_templates(tokenizer, self.safety_templates)


NAMES = tuple(one.name for one in fields(SafetySettings))
"""Of the fields, in order."""
