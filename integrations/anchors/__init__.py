"""Prompts without an answer at which the penalty stands, and their pass in a training step."""

from __future__ import annotations

from .passes import AnchorPass
from .prompts import AnchorPrompts, read_prompts

__all__ = [
    "AnchorPass",
    "AnchorPrompts",
    "read_prompts",
]
