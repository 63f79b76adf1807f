"""Where the reference's safety logits come from: adapters off, or a second model.

Both run the reference in eval mode without gradient, catch the hidden state before the head, and
project it onto the safety ids alone: the reference never holds logits of the full vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .hf_models import Head, capture_hidden, evaluation_mode
from .peft_adapters import adapters_off

Measure = Callable[..., Tensor]
"""`project` or `safety_log_probs`: from hidden states, head and ids to (N, K)."""


def reference_logits(
    model: nn.Module,
    forward: Callable[..., Any],
    head: Head,
    safety_ids: Tensor,
    batch: dict[str, Any],
    measure: Measure,
) -> Tensor:  # (B * T, K)
    """Run `forward` without gradient in eval mode and measure what reaches the head."""
    with torch.no_grad(), evaluation_mode(model):
        with capture_hidden(head.module) as captured:
            forward(**_without_cache(forward, batch))
        hidden = captured.take()
        return measure(
            hidden.flatten(0, 1),
            head.module.weight,
            safety_ids,
            linear_bias=head.module.bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
        )


class AdaptersOff:
    """The model's own weights with its adapters switched off."""

    def __init__(self, peft_model: Any, inner: nn.Module, forward: Any, head: Head) -> None:
        self.peft_model = peft_model
        self.inner = inner
        self.forward = forward
        self.head = head

    def __call__(self, safety_ids: Tensor, batch: dict[str, Any], measure: Measure) -> Tensor:
        """Return the reference's (B * T, K) safety logits for a batch."""
        with adapters_off(self.peft_model):
            return reference_logits(self.inner, self.forward, self.head, safety_ids, batch, measure)


class FrozenModel:
    """A second model, on the same device or on another one."""

    def __init__(self, model: nn.Module, head: Head) -> None:
        self.model = model
        self.head = head

    def __call__(self, safety_ids: Tensor, batch: dict[str, Any], measure: Measure) -> Tensor:
        """Return the reference's (B * T, K) safety logits for a batch, on the batch's device."""
        device = self.head.module.weight.device
        home = safety_ids.device
        moved = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        ids = safety_ids.to(device)
        return reference_logits(self.model, self.model.forward, self.head, ids, moved, measure).to(
            home
        )


def _without_cache(forward: Callable[..., Any], batch: dict[str, Any]) -> dict[str, Any]:
    accepts = "use_cache" in inspect.signature(forward).parameters
    return {**batch, "use_cache": False} if accepts else batch
