"""transformers' Trainer with the safety loss: attaches for train() and logs the terms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..contracts import SafetyPenalty
from ..safety_tokens import SafetyTokens
from .attach import Positions, SafetyHandle, attach
from .loss_paths import PathName
from .references import ReferenceFunction


class SafetyTrainer(Trainer):
    """Trainer whose model is attached while it trains.

    Logs, beside Trainer's own entries and at the same steps, averaged over the steps between:
    `safety/ce` (nats), `safety/penalty` (squared logits) and `safety/max_drift` (logits, the
    largest). They stay on the device until they are logged.

    Args:
        args: as for Trainer, positional and keyword.
        safety_tokens: the ids to hold.
        penalty: kind and weight.
        ref_model: the frozen aligned model; None takes the model with its adapters off.
        reference, positions, path, chunk_bytes, backend: as in `attach`.
        kwargs: as for Trainer.

    Raises:
        ValueError: Liger's own fused loss, label smoothing or a `compute_loss_func` is on, which
            would replace ours.
    """

    def __init__(
        self,
        *args: Any,
        safety_tokens: SafetyTokens,
        penalty: SafetyPenalty | None = None,
        ref_model: nn.Module | None = None,
        reference: ReferenceFunction | None = None,
        positions: Positions = "response",
        path: PathName = "linear",
        chunk_bytes: int | None = None,
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._attach_options: dict[str, Any] = {
            "safety_tokens": safety_tokens,
            "penalty": penalty,
            "ref_model": ref_model,
            "reference": reference,
            "positions": positions,
            "path": path,
            "chunk_bytes": chunk_bytes,
            "backend": backend,
        }
        self._safety: SafetyHandle | None = None
        self._sums: Tensor | None = None  # (2,) ce and penalty
        self._worst: Tensor | None = None  # () max_drift
        self._micro_steps = 0
        self._step_of_last_log = 0
        _check_liger(self.args)
        if self.args.label_smoothing_factor or self.compute_loss_func is not None:
            raise ValueError(
                "`label_smoothing_factor` and `compute_loss_func` must be off: with either Trainer "
                "makes the loss itself, without the penalty"
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does, with the model attached from here to the return."""
        with attach(self.model, **self._attach_options) as self._safety:
            self._sums = self._worst = None
            self._micro_steps = 0
            return super().train(*args, **kwargs)

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Compute Trainer's loss and keep the step's terms, without waiting for the device."""
        before = None if self._safety is None else self._safety.last
        loss = super().compute_loss(model, *args, **kwargs)
        terms = None if self._safety is None else self._safety.last
        if self._safety is not None and model.training:
            if terms is None or terms is before:
                raise RuntimeError("this step made no safety loss: its batch must have labels")
            if self._sums is None:  # the first since the log, or since the start
                self._step_of_last_log = self.state.global_step
            sums = torch.stack([terms.ce, terms.penalty])
            self._sums = sums if self._sums is None else self._sums + sums
            worst = terms.max_drift
            self._worst = worst if self._worst is None else torch.maximum(self._worst, worst)
            self._micro_steps += 1
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the terms to the training entries, then log as Trainer does."""
        if "loss" in logs and self._sums is not None and self._worst is not None:
            # Terms divided by num_items_in_batch add up over the micro-steps of a step;
            # terms that are means of their own micro-batch are averaged.
            steps = max(1, self.state.global_step - self._step_of_last_log)
            count = steps if self.model_accepts_loss_kwargs else self._micro_steps
            ce, penalty = (self._sums / count).tolist()
            logs = {
                **logs,
                "safety/ce": ce,
                "safety/penalty": penalty,
                "safety/max_drift": float(self._worst),
            }
            self._sums = self._worst = None
            self._micro_steps = 0
        super().log(logs, *args, **kwargs)


def _check_liger(args: Any) -> None:
    if not getattr(args, "use_liger_kernel", False):
        return
    config = getattr(args, "liger_kernel_config", None) or {}
    if config.get("fused_linear_cross_entropy", True) or config.get("cross_entropy", False):
        raise ValueError(
            "`liger_kernel_config` must switch Liger's losses off, {'fused_linear_cross_entropy': "
            f"False, 'cross_entropy': False}}, since they would replace ours; got {config}"
        )
