"""Choose the row step: the caller's backend, or the best one for the device."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from .checks import check_backend
from .contracts import RowStep
from .parallel import VocabShard
from .rows.rows_torch import row_step_torch

_GPU_TYPES = ("cuda", "xpu")  # ROCm calls its devices "cuda" too


def choose_backend(
    backend: str, device: torch.device, dtype: torch.dtype, *, spread: bool = False
) -> str:
    """Turn "auto" into "triton" or "torch", and check that the backend can run.

    Args:
        backend: a `contracts.Backend`.
        device: of the logits or hidden states.
        dtype: of the logits or hidden states; Triton does not support float64.
        spread: whether the vocabulary is divided over ranks, which only "torch" supports.

    Returns:
        A backend other than "auto".

    Raises:
        ValueError: the name is unknown, or the backend cannot run here.
    """
    check_backend(backend)
    if spread:
        if backend not in ("auto", "torch"):
            raise ValueError(
                "`backend` must be 'auto' or 'torch' where the head's rows are spread over a "
                f"process group; got {backend!r}"
            )
        return "torch"
    if backend == "auto":
        if device.type not in _GPU_TYPES or _missing_for_triton(device, dtype):
            return "torch"
        return "triton"
    if missing := missing_for(backend, device, dtype):
        raise ValueError(f"`backend` must be one that can run here; got {backend!r}, but {missing}")
    return backend


def missing_for(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say what keeps a backend from running, or None."""
    if backend == "compiled":
        return _missing_for_compiled(device)
    if backend == "triton":
        return _missing_for_triton(device, dtype)
    return None


def _missing_for_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say what keeps the Triton kernels from running, or None."""
    if dtype == torch.float64:
        return "its kernels sum in float32 and the input is float64"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type not in _GPU_TYPES and not _interpreting():
        return (
            f"the device is {device.type} (set TRITON_INTERPRET=1 before triton is imported "
            "to run its kernels on a CPU, slowly)"
        )
    return None


@functools.cache
def _cxx_compiler() -> str | None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return get_cpp_compiler()
    except RuntimeError:  # inductor's InvalidCxxCompiler
        return None


def _missing_for_compiled(device: torch.device) -> str | None:
    """Say what keeps torch.compile from making the row step, or None."""
    if torch.compiler.is_compiling():
        return None
    if device.type == "cpu" and _cxx_compiler() is None:
        return "torch.compile finds no C++ compiler (on Debian and Ubuntu: apt-get install g++)"
    return None


def row_step_of(backend: str) -> RowStep:
    """Return the row step of a backend; heavy modules are imported only when needed."""
    if backend == "torch":
        return row_step_torch
    if backend == "compiled":
        from .rows.rows_compiled import row_step_compiled

        return row_step_compiled
    from .rows.rows_triton import row_step_triton

    return row_step_triton


def row_step_of_shard(shard: VocabShard) -> RowStep:
    """Return the row step for a rank that has a part of the vocabulary."""
    return functools.partial(row_step_torch, shard=shard)


def _interpreting() -> bool:
    # Parsed as triton does; dynamo cannot trace into triton's own settings.
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
