"""A model's own loss, which ours replaces: next-token cross-entropy plus an auxiliary loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...op import IGNORE_INDEX


def check_own_forward(model: nn.Module) -> None:
    """Refuse a model whose class has Unsloth's forward.

    It computes the loss in kernels of its own, possibly without calling the head, and keeps buffers
    between the forwards of a step.
    """
    module = str(getattr(type(model).forward, "__module__", ""))
    if module.partition(".")[0] in ("unsloth", "unsloth_zoo"):
        raise ValueError(
            f"`model` must have transformers' own forward; got {module}. Unsloth makes the loss in "
            "kernels of its own: load the model by transformers, or use the functions of "
            "str_kernels on hidden states"
        )


def auxiliary_loss(model: nn.Module, output: Any) -> Tensor | float:
    """Return the weighted auxiliary loss that a mixture-of-experts model adds to its loss."""
    auxiliary = getattr(output, "aux_loss", None)
    if not isinstance(auxiliary, Tensor):
        return 0.0
    config = getattr(model, "config", None)
    for owner in (model, getattr(config, "text_config", None)):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            coefficient = getattr(owner, name, None)
            if coefficient is not None:
                return auxiliary * float(coefficient)
    return 0.0  # the probe has checked this against the model's own loss


def shift(labels: Any) -> Tensor:  # (B, T)
    """Shift labels so that position t predicts label t + 1; the last one predicts nothing."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def reason_against_loss(
    model: nn.Module, logits: Tensor, ids: Tensor, own_loss: float
) -> str | None:
    """Say why ours must not replace a model's loss on a probe, or return None if it may.

    Args:
        model: the model that was probed.
        logits: (1, T, V).
        ids: (1, T), the inputs and labels.
        own_loss: the model's loss without its auxiliary loss.
    """
    name = type(model).__name__
    if logits.shape[:2] != ids.shape:
        return (
            f"return one row of logits per token; {name} returned {tuple(logits.shape)} for "
            f"{ids.shape[1]} tokens"
        )
    target = shift(ids).to(logits.device).flatten()
    rows = logits.flatten(0, 1)
    expected = float(cross_entropy(rows.float(), target, ignore_index=IGNORE_INDEX))
    in_dtype = float(cross_entropy(rows, target, ignore_index=IGNORE_INDEX))
    # An unshifted loss is off by nats, but an auxiliary loss may be small. Some models compute
    # theirs in 16 bits.
    if min(abs(own_loss - x) for x in (expected, in_dtype)) <= 1e-5 * max(abs(expected), 1.0):
        return None
    return (
        "have next-token cross-entropy as its own loss, which is what takes its place; that "
        f"of {name} is {own_loss:.6g} where cross-entropy is {expected:.6g}"
    )
