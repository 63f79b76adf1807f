"""Axolotl's plugin for the safety loss.

In the YAML:

    plugins:
      - str_kernels.integrations.trainers.axolotl_plugin.SafetyPlugin
    safety_weight: 0.1

Every field of SafetySettings is one. The trainer is Axolotl's own with SafetyTrainerMixin in front,
so that its schedules, packing and checkpoints stay.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_type_hints

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, create_model

from ..attach import NAMES, SafetySettings
from .hf_trainer import SafetyTrainerMixin

# YAML reads 3 as a number; TRL's parser takes no union with str
_HINTS = get_type_hints(SafetySettings) | {"safety_positions": int | str}
_FIELDS: Any = {one.name: (_HINTS[one.name], one.default) for one in fields(SafetySettings)}
SafetyArgs: type[BaseModel] = create_model("SafetyArgs", **_FIELDS)
"""What Axolotl validates the YAML by; the fields are those of SafetySettings."""

# Each puts a loss of its own in the place of the model's.
_OTHER_LOSSES = (
    "cut_cross_entropy",
    "chunked_cross_entropy",
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "unsloth_cross_entropy_loss",
)


class SafetyPlugin(BasePlugin):
    """Trains with the safety loss; supervised fine-tuning only."""

    def get_input_args(self) -> str:
        """Name the pydantic model of the plugin's fields."""
        return f"{__name__}.SafetyArgs"

    def pre_model_load(self, cfg: Any) -> None:
        """Refuse what would take the loss's place, before anything is loaded."""
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
            """AxolotlTrainer whose model is attached while it trains."""

        return SafetyAxolotlTrainer

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Tell the trainer what to hold; it attaches when train() starts."""
        given = {name: cfg.get(name) for name in NAMES if cfg.get(name) is not None}
        settings = SafetySettings(**given)
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        trainer.safety_tokens = settings.tokens(tokenizer)
        trainer.attach_options = settings.attach_options(tokenizer, cfg.get("seed") or 0)
