"""TRL's SFTTrainer with the safety loss, in the pass that makes its cross-entropy and metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from ..contracts import IGNORE_INDEX, PenaltyKind, SafetyLoss, SafetyPenalty
from ..safety_tokens import SafetyTokens
from .anchors import AnchorPrompts
from .hf_trainer import SafetyTrainerMixin


@dataclass
class SafetySFTConfig(SFTConfig):
    """SFTConfig with what the safety loss needs; TrlParser reads it from flags and YAML.

    Args:
        safety_weight: of the penalty; 0 is plain fine-tuning with the drift still measured.
        safety_kind: of penalty, as in SafetyPenalty.
        safety_tokens: a safety_tokens.json; the tokens of the refusal templates when None.
        safety_templates: a file of refusal templates, one a line, instead of the built-in ones.
        safety_positions: "response", "all", or the first m labels of each response.
        safety_ref_every: ask the reference in every n-th forward only.
        safety_path: "linear" or "logits", as in `attach`.
        safety_anchors: prompts at which the model is held too: a JSONL file, or "anchors".
        safety_anchors_per_step: harmful ones in each step.
        safety_harmless_anchors_per_step: harmless ones.
        safety_anchor_weight: of all anchors together among the rows.
    """

    safety_weight: float = field(default=0.1, metadata={"help": "Weight of the penalty."})
    safety_kind: str = field(default="mse", metadata={"help": "Kind of the penalty."})
    safety_tokens: str | None = field(
        default=None, metadata={"help": "A safety_tokens.json, instead of the templates."}
    )
    safety_templates: str | None = field(
        default=None, metadata={"help": "A file of refusal templates, one a line."}
    )
    safety_positions: str = field(
        default="response", metadata={"help": "'response', 'all', or a number of labels."}
    )
    safety_ref_every: int = field(
        default=1, metadata={"help": "Ask the reference in every n-th forward only."}
    )
    safety_path: str = field(default="linear", metadata={"help": "'linear' or 'logits'."})
    safety_anchors: str | None = field(
        default=None, metadata={"help": "A JSONL file of prompts, or 'anchors'."}
    )
    safety_anchors_per_step: int = field(default=2, metadata={"help": "Harmful ones in a step."})
    safety_harmless_anchors_per_step: int = field(
        default=0, metadata={"help": "Harmless ones in a step."}
    )
    safety_anchor_weight: float = field(
        default=1.0, metadata={"help": "1: as much as all labels together."}
    )

    def attach_options(self, tokenizer: Any) -> dict[str, Any]:
        """Return the keywords of `attach` that these fields stand for."""
        positions = self.safety_positions
        options: dict[str, Any] = {
            "penalty": SafetyPenalty(self.safety_weight, cast(PenaltyKind, self.safety_kind)),
            "positions": int(positions) if positions.isdigit() else positions,
            "ref_every": self.safety_ref_every,
            "path": self.safety_path,
        }
        if self.safety_anchors is not None:
            options["anchors"] = AnchorPrompts.from_prompts(
                tokenizer,
                self.safety_anchors,
                per_step=self.safety_anchors_per_step,
                harmless_per_step=self.safety_harmless_anchors_per_step,
                weight=self.safety_anchor_weight,
                seed=self.seed,
            )
        return options

    def tokens(self, tokenizer: Any) -> SafetyTokens:
        """Return the SafetyTokens that these fields stand for."""
        if self.safety_tokens is not None:
            return SafetyTokens.load(self.safety_tokens, tokenizer)
        return SafetyTokens.from_templates(tokenizer, self.safety_templates)


class SafetySFTTrainer(SafetyTrainerMixin, SFTTrainer):
    """SFTTrainer whose model is attached while it trains; all of TRL's own metrics are kept.

    Args:
        args: as for SFTTrainer, positional and keyword; a SafetySFTConfig says how to attach.
        safety_tokens: the ids to hold; those of the SafetySFTConfig when None.
        kwargs: every keyword of `attach`, before those of the config, and those of SFTTrainer.

    Raises:
        ValueError: `loss_type="dft"`, label smoothing or a `compute_loss_func`, whose loss is not
            the cross-entropy that ours takes the place of; or neither tokens nor a
            SafetySFTConfig.
    """

    def __init__(
        self, *args: Any, safety_tokens: SafetyTokens | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, safety_tokens=safety_tokens, **kwargs)
        if self.args.loss_type != "nll":
            raise ValueError(f"`loss_type` must be 'nll'; got {self.args.loss_type!r}")
        if isinstance(self.args, SafetySFTConfig):
            tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
            self.attach_options = self.args.attach_options(tokenizer) | self.attach_options
            self.safety_tokens = self.safety_tokens or self.args.tokens(tokenizer)
        if self.safety_tokens is None:
            raise ValueError("`safety_tokens` must be given unless `args` is a SafetySFTConfig")

    def prepare_step(self, num_items_in_batch: Any) -> None:
        """Have the attached forward answer in TRL's own form."""
        if self.safety is not None:
            self.safety.for_trl(_as_trl_output, num_items_in_batch)


def _as_trl_output(
    output: Any,
    loss: Tensor,  # ()
    terms: SafetyLoss,
    target: Tensor,  # (B, T)
    num_items: Any,
) -> FusedCausalLMOutput:
    """Return what TRL sums over all positions and divides, as one position that holds the sums."""

    def total(mean: Tensor | None) -> Tensor | None:
        return None if mean is None else (mean * num_items).reshape(1, 1)

    return FusedCausalLMOutput(
        log_probs=total(-loss),
        entropy=total(terms.entropy),
        is_top1=total(terms.token_accuracy),
        label_mask=target != IGNORE_INDEX,
        aux_loss=getattr(output, "aux_loss", None),
    )
