"""The safety loss in the trainers of transformers, TRL, Axolotl and ms-swift."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .hf_trainer import SafetyTrainer, SafetyTrainerMixin

if TYPE_CHECKING:
    from .trl_sft import SafetySFTConfig, SafetySFTTrainer

__all__ = [
    "SafetySFTConfig",
    "SafetySFTTrainer",
    "SafetyTrainer",
    "SafetyTrainerMixin",
]


def __getattr__(name: str) -> Any:
    if name in ("SafetySFTConfig", "SafetySFTTrainer"):  # which need trl
        from . import trl_sft

        return getattr(trl_sft, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
