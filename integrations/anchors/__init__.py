"""Anchors: prompts without answers at which the penalty is taken, in a pass of their own."""

from __future__ import annotations

from .passes import AnchorPass
from .prompts import AnchorPrompts, read_prompts

__all__ = [
    "AnchorPass",
    "AnchorPrompts",
    "read_prompts",
]
