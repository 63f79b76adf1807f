"""PEFT models as their own reference: the same weights with the adapters off.

Only what is known to be exact is let through; everything else is refused with the reason, since a
reference that moves with the student would make the penalty silently meaningless.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

# Initialisations after which "adapters off" is still the model that was loaded. The others (PiSSA,
# OLoRA, LoftQ, CorDA, ...) move part of the base weight into the adapter.
_SAFE_INITS = (True, False, "gaussian", "eva")


def is_peft_model(model: nn.Module) -> bool:
    """Tell a PeftModel without importing peft."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def base_of(model: Any) -> nn.Module:
    """Return the model that a PeftModel wraps, and any other model as it is."""
    base: nn.Module = model.get_base_model() if is_peft_model(model) else model
    return base


def check_adapters(model: Any) -> None:
    """Refuse adapters whose removal does not give back the aligned model.

    Args:
        model: a PeftModel.

    Raises:
        ValueError: the message names the adapter, what is wrong with it and what to do.
    """
    for name, config in model.peft_config.items():
        reason = _reason_against(config)
        if reason:
            raise ValueError(
                f"`model` must be its own reference with its adapters off, but adapter {name!r} "
                f"{reason}. Pass `ref_model`, a frozen copy of the aligned model."
            )
    trainable = trainable_base_parameters(model)
    if trainable:
        raise ValueError(
            "`model` must have frozen base weights to be its own reference; trainable are "
            f"{', '.join(trainable[:3])}{' ...' if len(trainable) > 3 else ''}. "
            "Freeze them or pass `ref_model`, a frozen copy of the aligned model."
        )


def trainable_base_parameters(model: Any) -> list[str]:
    """Return the names of trainable parameters that stay when the adapters are switched off."""
    prefix = getattr(model.base_model, "prefix", "") or ""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and not (prefix and prefix in name)
        and ".modules_to_save." not in name
    ]


@contextlib.contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Switch the adapters off, and on again with requires_grad as it was.

    PEFT's own context sets requires_grad of every adapter to True on the way out, also of those
    that were frozen.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, requires_grad in before:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)


def _reason_against(config: Any) -> str | None:
    if getattr(config, "is_prompt_learning", False):
        return f"is of type {config.peft_type} and adds positions to the input"
    init = getattr(config, "init_lora_weights", True)
    if init not in _SAFE_INITS:
        return f"was initialised by {init!r}, which changes the base weights"
    bias = getattr(config, "bias", "none")
    if bias != "none":
        return f"trains biases of the base model (bias={bias!r})"
    return None
