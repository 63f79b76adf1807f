"""The two losses as nn.Modules that store their safety tokens and follow `.to(device)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar

from torch import Tensor, nn

from .op import (
    LossOptions,
    SafetyLoss,
    SafetyPenalty,
    safety_cross_entropy,
    safety_linear_cross_entropy,
)
from .tokens import SafetyTokens

_SHARED = frozenset(one.name for one in fields(LossOptions))


class _SafetyModule(nn.Module):
    function: ClassVar[Callable[..., SafetyLoss]]
    safety_ids: Tensor

    def __init__(
        self, safety_tokens: SafetyTokens, penalty: SafetyPenalty | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.penalty = safety_tokens.weigh(penalty)
        _check_options(self.function, options)
        self.options = options
        # not persistent: the ids belong in safety_tokens.json, not in a checkpoint
        self.register_buffer("safety_ids", safety_tokens.ids, persistent=False)

    def extra_repr(self) -> str:
        """Return the details shown when the module is printed."""
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"K={self.safety_ids.shape[0]}, kind={self.penalty.kind!r}{options}"


def _check_options(function: Callable[..., SafetyLoss], options: dict[str, Any]) -> None:
    """Raise now, not in the first step, for options that the function would refuse."""
    parameters = inspect.signature(function).parameters.values()
    names = [one.name for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY]
    names.remove("penalty")  # an argument of the module itself
    for name, value in options.items():
        if name not in names:
            raise TypeError(f"`{name}` must be one of {', '.join(names)}; got {name}={value!r:.60}")
    LossOptions(**{name: value for name, value in options.items() if name in _SHARED})


class SafetyCrossEntropyLoss(_SafetyModule):
    """`safety_cross_entropy` as a module, with fixed safety tokens and options.

    Args:
        safety_tokens: the ids whose logits are penalised.
        penalty: kind and weight; the defaults of SafetyPenalty when None.
        options: keyword arguments of `safety_cross_entropy` for every call, such as `reduction`
            or `softcap`.

    Raises:
        TypeError: an option is not one of those keywords, or of the wrong type.
        ValueError: its value is wrong.

    Examples:
        >>> import torch
        >>> loss_fn = SafetyCrossEntropyLoss(SafetyTokens(ids=[0, 4]))
        >>> terms = loss_fn(torch.zeros(2, 5), torch.tensor([1, 2]), torch.zeros(2, 2))
        >>> float(terms.penalty)
        0.0
    """

    function = staticmethod(safety_cross_entropy)

    def forward(
        self,
        logits: Tensor,  # (N, V)
        target: Tensor,  # (N,)
        ref_safety_logits: Tensor,  # (N, K) or (K,)
        **changing: Any,
    ) -> SafetyLoss:
        """Compute the loss; `changing` are arguments that differ by step, such as `num_items`."""
        options = {**self.options, **changing}
        return self.function(
            logits, target, self.safety_ids, ref_safety_logits, penalty=self.penalty, **options
        )


class SafetyLinearCrossEntropyLoss(_SafetyModule):
    """`safety_linear_cross_entropy` as a module, with fixed safety tokens and options.

    Args:
        safety_tokens: the ids whose logits are penalised.
        penalty: kind and weight; the defaults of SafetyPenalty when None.
        options: keyword arguments of `safety_linear_cross_entropy` for every call.

    Raises:
        TypeError: an option is not one of those keywords, or of the wrong type.
        ValueError: its value is wrong.
    """

    function = staticmethod(safety_linear_cross_entropy)

    def forward(
        self,
        hidden: Tensor,  # (N, D)
        linear_weight: Tensor,  # (V, D)
        target: Tensor,  # (N,)
        ref_safety_logits: Tensor,  # (N, K) or (K,)
        **changing: Any,
    ) -> SafetyLoss:
        """Compute the loss; `changing` are arguments that differ by step, such as `num_items`."""
        options = {**self.options, **changing}
        return self.function(
            hidden,
            linear_weight,
            target,
            self.safety_ids,
            ref_safety_logits,
            penalty=self.penalty,
            **options,
        )
