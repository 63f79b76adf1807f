"""The loss: its functions, their autograd, chunks and row steps."""

from __future__ import annotations

from .backends import choose_backend, missing_for
from .checks import (
    check_backend,
    check_chunk_bytes,
    check_id_values,
    check_tensor,
    read_json_object,
)
from .chunks import row_bytes, rows_per_chunk
from .contracts import (
    IGNORE_INDEX,
    Backend,
    PenaltyKind,
    SafetyLoss,
    SafetyPenalty,
    accumulation_dtype,
    check_id_weights,
    check_number,
)
from .functional import safety_cross_entropy, safety_linear_cross_entropy, safety_log_probs
from .loss_args import LossOptions
from .penalties import ON_LOG_PROBS
from .projection import project, scale_and_cap

__all__ = [
    "IGNORE_INDEX",
    "ON_LOG_PROBS",
    "Backend",
    "LossOptions",
    "PenaltyKind",
    "SafetyLoss",
    "SafetyPenalty",
    "accumulation_dtype",
    "check_backend",
    "check_chunk_bytes",
    "check_id_values",
    "check_id_weights",
    "check_number",
    "check_tensor",
    "choose_backend",
    "missing_for",
    "project",
    "read_json_object",
    "row_bytes",
    "rows_per_chunk",
    "safety_cross_entropy",
    "safety_linear_cross_entropy",
    "safety_log_probs",
    "scale_and_cap",
]
