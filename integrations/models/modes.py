"""How a model is run: train and eval mode, 4-bit layers, and what torch.compile skips."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import nn

_Function = TypeVar("_Function", bound=Callable[..., Any])


def runs_the_model(function: _Function) -> _Function:
    """Mark a function that calls a model: torch.compile skips it, but compiles the model."""
    return cast("_Function", torch.compiler.disable(function, recursive=False))


def not_compiled(function: _Function) -> _Function:
    """Mark a function that torch.compile skips with all its calls: the loss is one op anyway."""
    return cast("_Function", torch.compiler.disable(function))


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode (no dropout, no checkpointing), then restore every module's own mode.

    bitsandbytes' 4-bit layers are put into training mode, which does not change their output. On a
    CPU with AVX512-BF16 their first forward in eval mode repacks the weights for good, and later
    forwards have no backward.
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
    """Put 4-bit layers back into training mode; see `evaluation_mode` for why."""
    for module in model.modules():
        if _is_4bit(module):
            module.training = True


def is_packed(module: nn.Module) -> bool:
    """Tell whether a 4-bit layer was run in eval mode on a CPU, and so has lost its backward."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


@not_compiled
def checkpoints(model: nn.Module) -> bool:
    """Tell whether gradient checkpointing is on; transformers then makes no cache."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
