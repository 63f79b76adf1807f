"""The namespace of the ops in torch.library.

A second copy of the package with the same namespace would silently replace the ops of the first.
So the copy that `make hub` makes for the Hugging Face `kernels` library has another file in this
place, with the same function and a namespace of its own.
"""

from __future__ import annotations

NAMESPACE = "str_kernels"


def add_op_namespace_prefix(op_name: str) -> str:
    """Return an op's full name."""
    return f"{NAMESPACE}::{op_name}"
