"""ms-swift's plugin for the safety loss.

Put this in a file, which swift runs in each of its processes:

    from str_kernels.integrations.trainers.swift_plugin import register

    register(safety_weight=0.1)

and call `swift sft ... --external_plugins that_file.py`. Every field of SafetySettings is a keyword
of `register`, prefixed with `safety_`; swift's command line takes only flags of its own. The
trainer is swift's own with SafetyTrainerMixin in front, so its templates, packing and checkpoints
are kept.
"""

from __future__ import annotations

import sys
from typing import Any

from swift.template import Template
from swift.trainers import Seq2SeqTrainer, TrainerFactory
from torch import Tensor

from ...attach_options import SafetySettings
from ...op import IGNORE_INDEX
from ..attach import keywords_of, tokens_of
from .hf_trainer import SafetyTrainerMixin

# With each of these swift takes the labels out of the batch and computes the loss itself.
_OTHER_LOSSES = ("loss_type", "enable_dft_loss", "enable_channel_loss")


def register(**settings: Any) -> None:
    """Make `swift sft` and `swift pt` train with the safety loss, and other commands refuse to.

    Args:
        settings: fields of SafetySettings, prefixed with `safety_`.

    Raises:
        TypeError: SafetySettings has no such field.
        ValueError: a value is wrong, or the command is `megatron sft`, which has another trainer.
    """
    read = SafetySettings.of(settings)
    if "swift.megatron.arguments" in sys.modules:
        raise ValueError("`external_plugins` must not have the safety plugin under Megatron: its "
                         "trainer makes the loss without the penalty. Use `swift sft`")  # fmt: skip
    SafetySwiftTrainer.settings = read
    mapping = TrainerFactory.TRAINER_MAPPING
    mapping.update(dict.fromkeys(mapping, f"{__name__}.OtherTrainer"))
    mapping["causal_lm"] = f"{__name__}.SafetySwiftTrainer"


class SafetySwiftTrainer(SafetyTrainerMixin, Seq2SeqTrainer):
    """swift's Seq2SeqTrainer, training with the safety loss.

    Args:
        positional: as for swift's trainer.
        args: swift's training arguments.
        template: swift's template.
        kwargs: as for swift's trainer.

    Raises:
        ValueError: one of swift's own losses would replace the safety loss.
    """

    settings = SafetySettings()
    """The settings given to register()."""

    _share: Tensor | float = 1.0  # this micro-step's fraction of the step's labels

    def __init__(self, *positional: Any, args: Any, template: Any, **kwargs: Any) -> None:
        _check_losses(args, template)
        super().__init__(*positional, args=args, template=template, **kwargs)
        self.safety_tokens = tokens_of(self.settings, template.tokenizer)
        self.attach_options = keywords_of(self.settings, template.tokenizer, args.seed)

    def prepare_step(self, inputs: Any, num_items_in_batch: Any) -> None:
        """Store the batch's share of the step's labels, which swift scales the mean loss by."""
        if num_items_in_batch is not None:
            self._share = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum() / num_items_in_batch

    def get_use_logits_to_keep(self, default_value: bool = True) -> bool:
        """Return False in training: all positions are needed, and the linear path has no logits."""
        return super().get_use_logits_to_keep(default_value) and not self.model.training

    def _add(self, name: str, value: Tensor) -> None:
        super()._add(name, value * self._share)  # swift scales only the loss


class OtherTrainer:
    """Replaces every other trainer of swift and refuses to train: their losses have no penalty."""

    def __init__(self, **kwargs: Any) -> None:
        raise ValueError(
            "`task_type` must be 'causal_lm', and the command `swift sft` or `swift pt`, with the "
            "safety plugin: the losses of other trainers have no penalty; got another of swift's"
        )


def _check_losses(args: Any, template: Any) -> None:
    for name in _OTHER_LOSSES:
        if getattr(args, name):
            raise ValueError(
                f"`{name}` must be off with the safety plugin: it replaces the loss of the model, "
                f"and with it the penalty; got {getattr(args, name)!r}"
            )
    if type(template).compute_sft_loss is not Template.compute_sft_loss:
        raise ValueError(
            "`template` must leave the loss to the model, with the safety plugin; got "
            f"{type(template).__name__}, which makes one of the logits"
        )
    if template.sequence_parallel_size > 1:
        raise ValueError(
            "`sequence_parallel_size` must be 1 with the safety plugin: over split rows swift "
            f"makes the loss itself; got {template.sequence_parallel_size}"
        )
    binary = template.is_binary_loss_scale
    if not (template.loss_scale.is_binary_loss_scale if binary is None else binary):
        raise ValueError(
            "`loss_scale` must be one that weighs tokens by 0 or 1, with the safety plugin: for "
            "other weights swift makes the loss itself, without the penalty; got "
            f"{type(template.loss_scale).__name__}"
        )
