"""transformers' Trainer with the safety loss: attaches for train() and logs the terms."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..safety_tokens import SafetyTokens
from .attach import SafetyHandle, attach

_OF_ATTACH = [
    name
    for name, parameter in inspect.signature(attach).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
]


class SafetyTrainer(Trainer):
    """Trainer whose model is attached while it trains.

    Logs, beside Trainer's own entries and at the same steps, averaged over the steps between:
    `safety/ce` (nats), `safety/penalty` (squared logits), with anchors `safety/anchor_penalty`
    (the same, times their weight), and `safety/max_drift` (logits, the largest, anchors
    included). They stay on the device until they are logged.

    Args:
        args: as for Trainer, positional and keyword.
        safety_tokens: the ids to hold.
        kwargs: every keyword of `attach` (penalty, ref_model, reference, positions, anchors,
            path, ...), and those of Trainer.

    Raises:
        ValueError: Liger's own fused loss, label smoothing or a `compute_loss_func` is on, which
            would replace ours.
    """

    def __init__(self, *args: Any, safety_tokens: SafetyTokens, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in _OF_ATTACH if name in kwargs}
        super().__init__(*args, **kwargs)
        self._attach_options: dict[str, Any] = {"safety_tokens": safety_tokens, **options}
        self._safety: SafetyHandle | None = None
        self._sums: dict[str, Tensor] = {}  # of the micro-steps since the last log
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
            self._start_sums()
            return super().train(*args, **kwargs)

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Compute Trainer's loss and keep the step's terms, without waiting for the device."""
        handle = self._safety if model.training else None
        if handle is None:
            return super().compute_loss(model, *args, **kwargs)
        before = handle.last
        handle.step = self.state.global_step  # a resumed run has the anchors it would have had
        loss = super().compute_loss(model, *args, **kwargs)
        if handle.last is None or handle.last is before:
            raise RuntimeError("this step made no safety loss: its batch must have labels")
        if not self._sums:  # the first since the log, or since the start
            self._step_of_last_log = self.state.global_step
        drifts = [handle.last.max_drift]
        self._add("safety/ce", handle.last.ce)
        self._add("safety/penalty", handle.last.penalty)
        if handle.last_anchors is not None:
            self._add("safety/anchor_penalty", handle.last_anchors.penalty)
            drifts.append(handle.last_anchors.max_drift)
        worst = drifts if self._worst is None else [*drifts, self._worst]
        self._worst = torch.stack(worst).amax()
        self._micro_steps += 1
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the terms to the training entries, then log as Trainer does."""
        if "loss" in logs and self._sums and self._worst is not None:
            # Terms divided by num_items_in_batch add up over the micro-steps of a step;
            # terms that are means of their own micro-batch are averaged.
            steps = max(1, self.state.global_step - self._step_of_last_log)
            count = steps if self.model_accepts_loss_kwargs else self._micro_steps
            *means, worst = torch.stack(
                [*(total / count for total in self._sums.values()), self._worst]
            ).tolist()
            logs = {
                **logs,
                **dict(zip(self._sums, means, strict=True)),
                "safety/max_drift": worst,
            }
            self._start_sums()
        super().log(logs, *args, **kwargs)

    def _start_sums(self) -> None:
        self._sums = {}
        self._worst = None
        self._micro_steps = 0

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = value if name not in self._sums else self._sums[name] + value


def _check_liger(args: Any) -> None:
    if not getattr(args, "use_liger_kernel", False):
        return
    config = getattr(args, "liger_kernel_config", None) or {}
    if config.get("fused_linear_cross_entropy", True) or config.get("cross_entropy", False):
        raise ValueError(
            "`liger_kernel_config` must switch Liger's losses off, {'fused_linear_cross_entropy': "
            f"False, 'cross_entropy': False}}, since they would replace ours; got {config}"
        )
