"""Which row step runs: the name a caller gave, or the best one for the device."""

from __future__ import annotations

import importlib.util
import os

import torch

from .checks import check_backend
from .contracts import RowStep
from .rows_torch import row_step_torch

_GPU_TYPES = ("cuda", "xpu")  # ROCm calls its devices "cuda" too


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Turn "auto" into "triton" or "torch", and refuse a backend that cannot do what is asked.

    Args:
        backend: "auto", "triton", "torch" or "eager".
        device: where the logits or hidden states are.
        dtype: their dtype; float64 is for "torch" and "eager".

    Returns:
        "triton", "torch" or "eager".

    Raises:
        ValueError: the name is unknown, or "triton" was asked for where it cannot run.
    """
    check_backend(backend)
    if backend == "auto":
        if device.type not in _GPU_TYPES or missing_for_triton(device, dtype):
            return "torch"
        return "triton"
    if backend == "triton" and (missing := missing_for_triton(device, dtype)):
        raise ValueError(f"`backend` must be one that can run here; got 'triton', but {missing}")
    return backend


def missing_for_triton(device: torch.device, dtype: torch.dtype) -> str | None:
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


def row_step_of(backend: str) -> RowStep:
    """Return the row step of "triton" or "torch"; triton is imported only when it is picked."""
    if backend == "torch":
        return row_step_torch
    from .rows_triton import row_step_triton

    return row_step_triton


def _interpreting() -> bool:
    # Read as triton reads it: dynamo cannot trace into triton's own settings.
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
