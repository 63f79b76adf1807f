"""The namespace of the ops in torch.library, which has one owner in a process.

A second copy of the package under the same namespace would take over the ops of the first without
a word. The copy that `make hub` makes for the Hugging Face `kernels` library therefore has another
file in this place, with the same function and a namespace of its own.
"""

from __future__ import annotations

NAMESPACE = "str_kernels"


def add_op_namespace_prefix(op_name: str) -> str:
    """Return an op's full name."""
    return f"{NAMESPACE}::{op_name}"
