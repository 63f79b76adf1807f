"""attach(model, ...): the loss in a model's own forward; its options as one object."""

from __future__ import annotations

from .hook import SafetyHandle, attach
from .settings import NAMES, SafetySettings

__all__ = [
    "NAMES",
    "SafetyHandle",
    "SafetySettings",
    "attach",
]
