"""Package the loss as a kernel of the Hugging Face `kernels` library: python -m bench hub."""

from __future__ import annotations

from .tree import hub, write_tree

__all__ = ["hub", "write_tree"]
