"""Axolotl's plugin for the safety loss.

In the YAML:

    plugins:
      - str_kernels.integrations.trainers.axolotl_plugin.SafetyPlugin
    safety_weight: 0.1

Every field of SafetySettings is a key, prefixed with `safety_`. The trainer is Axolotl's own with
SafetyTrainerMixin in front, so its schedules, packing and checkpoints are kept.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, Field, create_model

from ...attach_options import SETTINGS, SafetySettings
from ..attach import keywords_of, tokens_of
from .hf_trainer import SafetyTrainerMixin

# A key with `values` may also be a number: YAML reads "safety_positions: 3" as an int.
_FIELDS: Any = {
    one.name: (
        int | one.annotation if one.values else one.annotation,
        Field(one.default, description=one.help),
    )
    for one in SETTINGS
}
SafetyArgs: type[BaseModel] = create_model("SafetyArgs", **_FIELDS)
"""The pydantic model that Axolotl validates the YAML with."""

# Each replaces the model's loss with its own.
_OTHER_LOSSES = (
    "cut_cross_entropy",
    "chunked_cross_entropy",
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "unsloth_cross_entropy_loss",
)


class SafetyPlugin(BasePlugin):
    """Makes Axolotl train with the safety loss; supervised fine-tuning only."""

    def get_input_args(self) -> str:
        """Name the pydantic model of the plugin's fields."""
        return f"{__name__}.SafetyArgs"

    def pre_model_load(self, cfg: Any) -> None:
        """Refuse options that would replace the loss, before anything is loaded."""
        for name in _OTHER_LOSSES:
            if cfg.get(name):
                raise ValueError(
                    f"`{name}` must be off with SafetyPlugin: it replaces the loss of the model, "
                    "and with it the penalty"
                )
        if cfg.get("rl"):
            raise ValueError(
                f"`rl` must be unset with SafetyPlugin, whose loss is that of supervised "
                f"fine-tuning; got {cfg.get('rl')!r}"
            )

    def get_trainer_cls(self, cfg: Any) -> type[Any]:
        """Return Axolotl's own trainer with the mixin in front."""
        from axolotl.core.trainers.base import AxolotlTrainer

        class SafetyAxolotlTrainer(SafetyTrainerMixin, AxolotlTrainer):
            """AxolotlTrainer that trains with the safety loss."""

        return SafetyAxolotlTrainer

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Give the trainer its safety tokens and options; it attaches when train() starts."""
        given = {one.name: cfg.get(one.name) for one in SETTINGS}
        settings = SafetySettings.of({name: x for name, x in given.items() if x is not None})
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        trainer.safety_tokens = tokens_of(settings, tokenizer)
        trainer.attach_options = keywords_of(settings, tokenizer, cfg.get("seed") or 0)
