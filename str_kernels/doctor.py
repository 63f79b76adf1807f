"""Check what this machine can run: compute a tiny loss on each backend and compare with eager."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .loss_memory import random_inputs
from .op import choose_backend, missing_for, safety_linear_cross_entropy

_PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "accelerate", "safetensors")
# for float32 sums of 96 products in another order, relative to the largest entry
_TOLERANCE = 1e-5


class BackendCheck(NamedTuple):
    """The result of checking one backend on one device.

    Attributes:
        backend: its name.
        device: where it ran.
        status: "ok", "wrong" or "unavailable".
        detail: the largest relative error, or why it is unavailable.
    """

    backend: str
    device: str
    status: str
    detail: str


def versions() -> dict[str, str]:
    """Return the versions of Python and of the relevant packages; "missing" if not installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def devices() -> list[str]:
    """Return the devices torch sees, the CPU first."""
    found = ["cpu"]
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            found += [f"{kind}:{index}" for index in range(module.device_count())]
    return found


def check_backends(device: str) -> list[BackendCheck]:
    """Run forward and backward of each backend on `device` and compare with eager.

    Args:
        device: "cpu", "cuda:0", ...

    Returns:
        One entry per backend.
    """
    inputs = random_inputs(5, 96, 4099, 7, torch.float32, device)  # past one block, no multiple
    truth = _loss_and_gradient(inputs, "eager")
    found = []
    for backend in ("torch", "compiled", "triton"):
        missing = missing_for(backend, torch.device(device), torch.float32)
        if missing:
            found.append(BackendCheck(backend, device, "unavailable", missing))
            continue
        errors = [  # torch's max(), since Python's may miss a NaN
            (got - want).abs().max() / want.abs().max()
            for got, want in zip(_loss_and_gradient(inputs, backend), truth, strict=True)
        ]
        error = float(torch.stack(errors).max())
        status = "ok" if error <= _TOLERANCE else "wrong"  # a NaN is wrong too
        found.append(BackendCheck(backend, device, status, f"largest relative error {error:.1e}"))
    return found


def examine() -> dict[str, Any]:
    """Return versions, and for each device what "auto" picks and the check of each backend."""
    return {
        "versions": versions(),
        "devices": [
            {
                "device": device,
                "auto": choose_backend("auto", torch.device(device), torch.float32),
                "backends": [check._asdict() for check in check_backends(device)],
            }
            for device in devices()
        ],
    }


def _loss_and_gradient(inputs: tuple[Tensor, ...], backend: str) -> list[Tensor]:
    hidden, head, target, safety_ids, ref = inputs
    terms = safety_linear_cross_entropy(hidden, head, target, safety_ids, ref, backend=backend)
    (grad,) = torch.autograd.grad(terms.loss, hidden)
    return [terms.loss.detach(), terms.penalty, grad]
