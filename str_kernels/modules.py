"""The two losses as modules that hold their safety tokens and follow `.to(device)`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .op import SafetyLoss, SafetyPenalty, safety_cross_entropy, safety_linear_cross_entropy
from .tokens import SafetyTokens


class _SafetyModule(nn.Module):
    safety_ids: Tensor

    def __init__(
        self, safety_tokens: SafetyTokens, penalty: SafetyPenalty | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.penalty = safety_tokens.weigh(penalty)
        self.options = options
        # not persistent: the ids belong to safety_tokens.json, and a checkpoint must not carry them
        self.register_buffer("safety_ids", safety_tokens.ids, persistent=False)

    def extra_repr(self) -> str:
        """Return what the printed module says of itself."""
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"K={self.safety_ids.shape[0]}, kind={self.penalty.kind!r}{options}"


class SafetyCrossEntropyLoss(_SafetyModule):
    """`safety_cross_entropy` with its safety tokens and options held.

    Args:
        safety_tokens: the ids whose logits are held.
        penalty: kind and weight; the defaults of SafetyPenalty when None.
        options: keyword arguments of `safety_cross_entropy` that stay the same, such as
            `reduction` or `softcap`.

    Examples:
        >>> import torch
        >>> loss_fn = SafetyCrossEntropyLoss(SafetyTokens(ids=[0, 4]))
        >>> terms = loss_fn(torch.zeros(2, 5), torch.tensor([1, 2]), torch.zeros(2, 2))
        >>> float(terms.penalty)
        0.0
    """

    def forward(
        self,
        logits: Tensor,  # (N, V)
        target: Tensor,  # (N,)
        ref_safety_logits: Tensor,  # (N, K) or (K,)
        **changing: Any,
    ) -> SafetyLoss:
        """Compute the loss; `changing` are arguments that differ by step, such as `num_items`."""
        options = {**self.options, **changing}
        return safety_cross_entropy(
            logits, target, self.safety_ids, ref_safety_logits, penalty=self.penalty, **options
        )


class SafetyLinearCrossEntropyLoss(_SafetyModule):
    """`safety_linear_cross_entropy` with its safety tokens and options held.

    Args:
        safety_tokens: the ids whose logits are held.
        penalty: kind and weight; the defaults of SafetyPenalty when None.
        options: keyword arguments of `safety_linear_cross_entropy` that stay the same.
    """

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
        return safety_linear_cross_entropy(
            hidden,
            linear_weight,
            target,
            self.safety_ids,
            ref_safety_logits,
            penalty=self.penalty,
            **options,
        )
