"""How a model is run: its modes, its 4-bit layers, and what torch.compile leaves alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import nn

_Function = TypeVar("_Function", bound=Callable[..., Any])


def runs_the_model(function: _Function) -> _Function:
    """Mark what calls a model's forward: torch.compile leaves it alone, and compiles the model."""
    return cast("_Function", torch.compiler.disable(function, recursive=False))


def not_compiled(function: _Function) -> _Function:
    """Mark what torch.compile leaves alone with all that it calls: the loss is one op anyway."""
    return cast("_Function", torch.compiler.disable(function))


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode (no dropout, no checkpointing) and put every module's own mode back.

    bitsandbytes' 4-bit layers are left in training mode, which changes nothing of what they say:
    on a CPU with AVX512-BF16 their first forward in eval mode packs the weights anew for good, and
    later ones have no backward.
    """
    before = [(module, module.training) for module in model.modules()]
    for module, _ in before:
        module.training = _is_4bit(module)
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _is_4bit(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "quant_type", None) in ("nf4", "fp4")


def keep_4bit_layers_training(model: nn.Module) -> None:
    """Put 4-bit layers back into training mode, in which they compute the same; see above."""
    for module in model.modules():
        if _is_4bit(module):
            module.training = True


def is_packed(module: nn.Module) -> bool:
    """Tell a 4-bit layer that was evaluated on a CPU: its forward has no backward any more."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


@not_compiled
def checkpoints(model: nn.Module) -> bool:
    """Tell whether gradient checkpointing is on, under which transformers makes no cache."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
