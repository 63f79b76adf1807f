"""TRL's SFTTrainer with the safety loss, from the pass that also gives TRL its metrics."""

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

# Made at run time: SFTConfig is not frozen, and so cannot inherit from the frozen SafetySettings.
_Fields: Any = make_dataclass(
    "_Fields",
    [
        (one.name, one.annotation, field(default=one.default, metadata={"help": one.described}))
        for one in SETTINGS
    ],
)


@dataclass
class SafetySFTConfig(_Fields, SFTConfig):
    """SFTConfig with every field of SafetySettings, prefixed with `safety_`.

    TrlParser reads all of them from flags and YAML.

    Raises:
        ValueError: a field of SafetySettings is wrong, or has no effect together with the others.
    """

    def __post_init__(self) -> None:
        _ = self.settings  # checked before TRL looks at the device
        # TRL's default is bfloat16, which transformers refuses on a CPU without `use_cpu`. A
        # script that sets neither would then run only on a GPU.
        own: Any = self
        if own.bf16 is None and not own.use_cpu and not torch.accelerator.is_available():
            own.bf16 = False
        super().__post_init__()

    @property
    def settings(self) -> SafetySettings:
        """The fields of SafetySettings, checked."""
        return SafetySettings.of({one.name: getattr(self, one.name) for one in SETTINGS})


class SafetySFTTrainer(SafetyTrainerMixin, SFTTrainer):
    """SFTTrainer that trains with the safety loss; all of TRL's own metrics are kept.

    Args:
        args: positional arguments of SFTTrainer. With a SafetySFTConfig, its fields set the
            options of `attach`.
        safety_tokens: the tokens whose logits the penalty compares; None takes those of the
            SafetySFTConfig.
        kwargs: keywords of `attach`, which override the config, and of SFTTrainer.

    Raises:
        ValueError: `loss_type` is not "nll", or label smoothing or a `compute_loss_func` is on,
            whose loss is not plain cross-entropy; or there are neither tokens nor a
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
        """Make the attached forward return TRL's own type of output."""
        if self.safety is not None:
            self.safety.for_trl(_as_trl_output, num_items_in_batch)


def _as_trl_output(
    output: Any,
    loss: Tensor,  # ()
    terms: SafetyLoss,
    target: Tensor,  # (B, T)
    num_items: Tensor,  # ()
) -> FusedCausalLMOutput:
    """Return TRL's output with the sums at one position, since TRL sums positions and divides."""

    def total(mean: Tensor | None) -> Tensor | None:
        return None if mean is None else (mean * num_items).reshape(1, 1)

    return FusedCausalLMOutput(
        log_probs=total(-loss),
        entropy=total(terms.entropy),
        is_top1=total(terms.token_accuracy),
        label_mask=target != IGNORE_INDEX,
        aux_loss=getattr(output, "aux_loss", None),
    )
