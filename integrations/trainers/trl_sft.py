"""TRL's SFTTrainer with the safety loss, in the pass that makes its cross-entropy and metrics."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from typing import Any

import torch
from torch import Tensor
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from ...attach_options import SETTINGS, SafetySettings
from ...op import IGNORE_INDEX, SafetyLoss
from ...tokens import SafetyTokens
from ..attach import keywords_of, tokens_of
from .hf_trainer import SafetyTrainerMixin

# No static class: a dataclass that can be written to, as SFTConfig is, cannot inherit the fields
# of a frozen one.
_Fields: Any = make_dataclass(
    "_Fields",
    [
        (one.name, one.annotation, field(default=one.default, metadata={"help": one.described}))
        for one in SETTINGS
    ],
)


@dataclass
class SafetySFTConfig(_Fields, SFTConfig):
    """SFTConfig, and every field of SafetySettings with `safety_` before its name.

    TrlParser reads both from flags and YAML.

    Raises:
        ValueError: one of SafetySettings is wrong, or of no use beside the others.
    """

    def __post_init__(self) -> None:
        _ = self.settings  # checked before TRL looks at the device
        # TRL's default is bfloat16, with which transformers refuses to train on a CPU unless told
        # to by `use_cpu`: a script that names neither would run on a GPU alone.
        fields: Any = self
        if fields.bf16 is None and not fields.use_cpu and not torch.accelerator.is_available():
            fields.bf16 = False
        super().__post_init__()

    @property
    def settings(self) -> SafetySettings:
        """The fields that say how to attach; checked."""
        return SafetySettings.of({one.name: getattr(self, one.name) for one in SETTINGS})


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
            asked = keywords_of(self.args.settings, tokenizer, self.args.seed)
            self.attach_options = asked | self.attach_options
            self.safety_tokens = self.safety_tokens or tokens_of(self.args.settings, tokenizer)
        if self.safety_tokens is None:
            raise ValueError("`safety_tokens` must be given unless `args` is a SafetySFTConfig")

    def prepare_step(self, inputs: Any, num_items_in_batch: Any) -> None:
        """Have the attached forward answer in TRL's own form."""
        if self.safety is not None:
            self.safety.for_trl(_as_trl_output, num_items_in_batch)


def _as_trl_output(
    output: Any,
    loss: Tensor,  # ()
    terms: SafetyLoss,
    target: Tensor,  # (B, T)
    num_items: Tensor,  # ()
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
