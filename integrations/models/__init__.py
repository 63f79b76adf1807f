"""What the loss needs of a Hugging Face model: its head, adapters, reference and positions."""

from __future__ import annotations

from ...attach_options import (
    PathName,
    Positions,
    check_path,
    check_positions,
    chosen_penalty,
    default_penalty,
    read_positions,
)
from .adapters import (
    adapters_off,
    base_of,
    check_adapters,
    check_start,
    check_student,
    has_adapters,
    is_peft_model,
    is_prompt_learning,
)
from .gradient_watch import GradientWatch
from .heads import contiguous_head_input, find_head
from .loss_paths import LossPath, make_path
from .modes import (
    checkpoints,
    evaluation_mode,
    keep_4bit_layers_training,
    not_compiled,
    runs_the_model,
)
from .optimizer_hooks import OptimizerHook
from .own_loss import auxiliary_loss, check_own_forward, shift
from .positions import ROW_WEIGHT, beside, row_weight_at
from .probe import ignores_padding
from .references import (
    AdaptersAtStart,
    AdaptersOff,
    CallableReference,
    FrozenModel,
    PromptOff,
    Reference,
    ReferenceFunction,
    Shortened,
    read_safety_logits,
)
from .sharded_weights import check_not_sharded

__all__ = [
    "ROW_WEIGHT",
    "AdaptersAtStart",
    "AdaptersOff",
    "CallableReference",
    "FrozenModel",
    "GradientWatch",
    "LossPath",
    "OptimizerHook",
    "PathName",
    "Positions",
    "PromptOff",
    "Reference",
    "ReferenceFunction",
    "Shortened",
    "adapters_off",
    "auxiliary_loss",
    "base_of",
    "beside",
    "check_adapters",
    "check_not_sharded",
    "check_own_forward",
    "check_path",
    "check_positions",
    "check_start",
    "check_student",
    "checkpoints",
    "chosen_penalty",
    "contiguous_head_input",
    "default_penalty",
    "evaluation_mode",
    "find_head",
    "has_adapters",
    "ignores_padding",
    "is_peft_model",
    "is_prompt_learning",
    "keep_4bit_layers_training",
    "make_path",
    "not_compiled",
    "read_positions",
    "read_safety_logits",
    "row_weight_at",
    "runs_the_model",
    "shift",
]
