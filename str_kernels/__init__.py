"""Safety Token Regularization: cross-entropy fused with a penalty on safety-token drift.

`import str_kernels` loads torch and nothing heavier; the first use of `attach` loads transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .modules import SafetyCrossEntropyLoss, SafetyLinearCrossEntropyLoss
from .op import (
    IGNORE_INDEX,
    SafetyLoss,
    SafetyPenalty,
    project,
    safety_cross_entropy,
    safety_linear_cross_entropy,
    safety_log_probs,
)
from .reference_cache import CachedReference
from .tokens import SafetyTokens

if TYPE_CHECKING:
    from .integrations.anchors import AnchorPrompts
    from .integrations.attach import attach

__version__ = "0.2.0"

__all__ = [
    "IGNORE_INDEX",
    "AnchorPrompts",
    "CachedReference",
    "SafetyCrossEntropyLoss",
    "SafetyLinearCrossEntropyLoss",
    "SafetyLoss",
    "SafetyPenalty",
    "SafetyTokens",
    "attach",
    "project",
    "safety_cross_entropy",
    "safety_linear_cross_entropy",
    "safety_log_probs",
]


def __getattr__(name: str) -> Any:
    if name == "attach":
        from .integrations.attach import attach

        return attach
    if name == "AnchorPrompts":
        from .integrations.anchors import AnchorPrompts

        return AnchorPrompts
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
