"""How to attach, as plain fields: what TRL's parser, Axolotl's YAML and others can fill in."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, get_args

from ...op import Backend, PenaltyKind, SafetyPenalty, check_backend, read_json_object
from ...reference_cache import CachedReference
from ...tokens import SafetyTokens
from ..anchors import AnchorPrompts
from ..models import Positions, check_anchor_options, chosen_penalty, read_positions


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class SafetySettings:
    """The fields that say which tokens are held, how, and at which anchors; see `attach`."""

    safety_weight: float | None = _option(
        None, "Weight of the penalty, 0.1 when unset; 0 is plain fine-tuning."
    )
    safety_kind: str | None = _option(
        None,
        f"Kind of the penalty: {', '.join(get_args(PenaltyKind))}. Unset: coarse_kl at anchors, "
        "mse on rows.",
    )
    safety_temperature: float = _option(1.0, "T of kind subset_kl.")
    safety_delta: float = _option(1.0, "Where kind huber turns straight, logits.")
    safety_tokens: str | None = _option(None, "A safety_tokens.json, instead of the templates.")
    safety_templates: str | None = _option(None, "A file of refusal templates, one a line.")
    safety_positions: str = _option(
        "none",
        "On the rows: 'none' (anchors alone), 'response' (the paper's form), 'all', or the first "
        "so many labels of each response.",
    )
    safety_ref_every: int = _option(1, "Ask the reference in every n-th forward only.")
    safety_ref_tokens: int | None = _option(
        None, "The reference reads a row's first tokens only, this many."
    )
    safety_path: str = _option("linear", "'linear' or 'logits', as in attach().")
    safety_chunk_bytes: int | None = _option(None, "Memory for one chunk's logits, bytes.")
    safety_backend: str = _option("auto", f"What makes the loss: {', '.join(get_args(Backend))}.")
    safety_cache: str | None = _option(
        None, "A folder made by `str-kernels cache build`, instead of the reference's passes."
    )
    safety_anchors: str | None = _option(
        None,
        "Prompts at which the model is held: 'default' for the package's, or a JSONL file. Unset: "
        "the package's where safety_positions is 'none', else none.",
    )
    safety_anchors_per_step: int = _option(2, "Harmful anchors in each step.")
    safety_harmless_anchors_per_step: int | None = _option(
        None, "Harmless anchors in each step; 2 when unset, or as many as there are."
    )
    safety_anchor_penalty_weight: float | None = _option(
        None, "Weight of the penalty at the anchors, by itself; safety_weight when unset."
    )
    safety_chat_template_kwargs: str | None = _option(
        None, "Of the chat template, for the anchors: a JSON object, as in training and use."
    )
    safety_answer_start: str | None = _option(
        None, "Text between an anchor's prompt and its answer, such as '</think>' and blank lines."
    )
    safety_anchor_weight: float | None = _option(
        None, "Not taken any more: see safety_anchor_penalty_weight."
    )

    def check(self) -> Positions:
        """Check what needs no tokenizer and no file, and return the positions.

        Raises:
            ValueError: a field is wrong, or is of no use beside the others.
        """
        if self.safety_anchor_weight is not None:
            raise ValueError(
                "`safety_anchor_weight` must be left out: it was relative to safety_weight. Set "
                "`safety_anchor_penalty_weight`, which is the anchors' weight by itself (before: "
                f"safety_weight * {self.safety_anchor_weight})"
            )
        positions = read_positions(self.safety_positions)
        alone = positions == "none"
        check_anchor_options(
            alone,
            alone or self.safety_anchors is not None,
            safety_weight=self.safety_weight,
            safety_anchor_penalty_weight=self.safety_anchor_penalty_weight,
            safety_harmless_anchors_per_step=self.safety_harmless_anchors_per_step,
            safety_chat_template_kwargs=self.safety_chat_template_kwargs,
            safety_answer_start=self.safety_answer_start,
        )
        if self.safety_tokens is not None and self.safety_templates is not None:
            raise ValueError(
                "`safety_templates` must not be given together with `safety_tokens`; got both"
            )
        check_backend(self.safety_backend)
        self._penalty(positions)
        return positions

    def _penalty(self, positions: Positions) -> SafetyPenalty:
        return chosen_penalty(
            positions,
            self.safety_weight,
            self.safety_kind,
            self.safety_temperature,
            self.safety_delta,
        )

    def attach_options(self, tokenizer: Any, seed: int = 0) -> dict[str, Any]:
        """Return the keywords of `attach` that the fields stand for."""
        positions = self.check()
        options: dict[str, Any] = {
            "penalty": self._penalty(positions),
            "positions": positions,
            "ref_every": self.safety_ref_every,
            "ref_tokens": self.safety_ref_tokens,
            "path": self.safety_path,
            "chunk_bytes": self.safety_chunk_bytes,
            "backend": self.safety_backend,
        }
        if self.safety_cache is not None:
            options["reference"] = CachedReference(self.safety_cache)
        if positions == "none" or self.safety_anchors is not None:
            options["anchors"] = AnchorPrompts.from_prompts(
                tokenizer,
                self.safety_anchors or "default",
                per_step=self.safety_anchors_per_step,
                harmless_per_step=self.safety_harmless_anchors_per_step,
                penalty_weight=self.safety_anchor_penalty_weight,
                chat_template_kwargs=read_json_object(
                    "safety_chat_template_kwargs", self.safety_chat_template_kwargs
                ),
                answer_start=self.safety_answer_start,
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
