"""The replacement for an attached model's forward, which computes the safety loss."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...attach_options import PlainOptions
from ...op import IGNORE_INDEX, ON_LOG_PROBS, SafetyLoss, SafetyPenalty
from ...tokens import SafetyTokens
from ..anchors import AnchorPass
from ..models import (
    ROW_WEIGHT,
    GradientWatch,
    LossPath,
    Reference,
    auxiliary_loss,
    beside,
    checkpoints,
    not_compiled,
    row_weight_at,
    runs_the_model,
    shift,
)

FusedOutput = Callable[[Any, Tensor, SafetyLoss, Tensor, Tensor], Any]
"""Makes the output that TRL expects from the model's output, loss, terms, target and divisor."""
_LOSS_ARGUMENTS = ("labels", "shift_labels", "num_items_in_batch")
_CACHES = ("past_key_values", "cache", "cache_params", "state", "mems")  # names in various models


class SafetyForward:
    """Replaces a model's forward. It is an object, not a closure, so that deepcopy copies it."""

    def __init__(
        self,
        inner: nn.Module,
        path: LossPath,
        reference: Reference,
        safety_tokens: SafetyTokens,
        penalty: SafetyPenalty,
        options: PlainOptions,
    ) -> None:
        self.inner = inner
        self.original = inner.forward
        self.signature = inspect.signature(self.original)
        self.path = path
        self.reference = reference
        self.safety_tokens = safety_tokens
        self.penalty = penalty
        self.positions = options.positions
        self.active = True
        self.reached = False
        self.warned = False
        self.ref_every = options.ref_every
        self.forwards = 0  # training forwards so far
        self.gradients = GradientWatch(inner)
        self.anchor_pass: AnchorPass | None = None
        # SafetySFTTrainer sets both: TRL calls the forward with fused_lm_head=True, expects its
        # own type of output, and does not pass the divisor.
        self.fused_output: FusedOutput | None = None
        self.num_items: Any = None
        self.last: SafetyLoss | None = None
        # Trainer reads the signature to choose columns and to see whether **kwargs are taken.
        functools.update_wrapper(self, self.original)

    @runs_the_model
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the safety loss in training with labels; otherwise call the model's forward."""
        self.reached = True
        batch = {**dict(zip(self.signature.parameters, args, strict=False)), **kwargs}
        labelled = batch.get("labels") is not None or batch.get("shift_labels") is not None
        if not (self.active and self.inner.training and labelled):
            self._warn_of_eval_mode(labelled)
            return self.original(*args, **kwargs)
        as_tuple = batch.pop("return_dict", None) is False
        fused = bool(batch.pop("fused_lm_head", False))
        if fused and self.fused_output is None:
            raise ValueError(
                "`fused_lm_head` must be False: this trainer of TRL makes its loss itself, of "
                "log-probabilities. Use SafetySFTTrainer, or the functions of str_kernels"
            )
        if fused:
            batch["num_items_in_batch"], self.num_items = self.num_items, None
        target, row_weight, num_items = self._prepare(batch)
        safety_ids = self.safety_tokens.ids_on(target.device)
        on_log_probs = self.penalty.kind in ON_LOG_PROBS
        # without ids, or without a penalty on the rows, the reference need not run
        ref = None
        if self._compares_rows() and self.forwards % self.ref_every == 0:
            # Under gradient checkpointing the student makes no cache, but the reference, in eval
            # mode, would. With a cache transformers lets packed rows attend to each other.
            same = {**batch, "use_cache": False} if checkpoints(self.inner) else batch
            ref = self.reference(safety_ids, same, on_log_probs)
        self.reference.skip(batch)
        self.forwards += 1
        output, states = self.path.run(self.original, {**batch, "return_dict": True})
        loss = self._loss(states, target, num_items, ref, row_weight, metrics=fused)
        if self.anchor_pass is not None and len(self.safety_tokens):
            share = _count(target) / _as_tensor(num_items, target.device).clamp(min=1)
            loss = loss + self.anchor_pass(self.original, batch, safety_ids, self.penalty, share)
        self.gradients.note(loss)
        if fused and self.fused_output is not None and self.last is not None:
            items = _as_tensor(num_items, target.device)
            return self.fused_output(output, loss, self.last, target, items)
        output = self._with_loss(output, loss)
        return output.to_tuple() if as_tuple else output

    @not_compiled
    def _warn_of_eval_mode(self, labelled: bool) -> None:
        """Warn once when a loss with gradients has no penalty, because of eval mode."""
        if self.warned or not (self.active and labelled and torch.is_grad_enabled()):
            return
        self.warned = True
        warnings.warn(
            "this loss has no safety penalty, though gradients are on: the attached model is in "
            "eval mode. Call model.train() before training steps, or evaluate under "
            "torch.no_grad()",
            stacklevel=4,
        )

    def _compares_rows(self) -> bool:
        return self.positions != "none" and len(self.safety_tokens) > 0

    @not_compiled
    def check_reached(self, inner: nn.Module, _: Any, batch: dict[str, Any], __: Any) -> None:
        """Raise if other code replaced our forward, since its loss has no penalty."""
        reached, self.reached = self.reached, False
        if inner.training and not reached and batch.get("labels") is not None:
            raise RuntimeError(
                "the attached model's forward was replaced (as TRL's SFTTrainer and Liger do), and "
                "this loss has no penalty: attach after that, or switch it off"
            )

    @not_compiled
    def _prepare(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None, Any]:
        """Pop the labels from the batch; return target (B, T), row weights (B, T) and divisor."""
        labels, shift_labels, num_items = (batch.pop(name, None) for name in _LOSS_ARGUMENTS)
        row_weight = batch.pop(ROW_WEIGHT, None)
        _check_logits_to_keep(batch)
        if not self.reference.has_fewer_positions:  # prefix tuning's tokens arrive as a cache
            _check_no_cache(batch)
        target = shift(labels) if shift_labels is None else shift_labels
        # With a model spread over devices, the labels may be on another one than the head, where
        # the loss is computed.
        target = target.to(self.path.device or target.device)
        if row_weight is None:
            row_weight = row_weight_at(self.positions, target, batch.get("attention_mask"))
        elif self.positions != "response":
            raise ValueError(
                f"`positions` must be 'response' for batches with `{ROW_WEIGHT}`, which says where "
                f"the penalty is taken; got {self.positions!r}"
            )
        elif row_weight.shape != target.shape:
            raise ValueError(
                f"`{ROW_WEIGHT}` must have the labels' shape {tuple(target.shape)}; got "
                f"{tuple(row_weight.shape)}"
            )
        else:
            row_weight = row_weight.to(target.device)
        return target, row_weight, _count(target) if num_items is None else num_items

    @not_compiled
    def _loss(
        self,
        states: Tensor,  # (B, T, D or V)
        target: Tensor,  # (B, T)
        num_items: Any,
        ref: Tensor | None,  # (B, T, K)
        row_weight: Tensor | None,  # (B, T)
        metrics: bool,
    ) -> Tensor:
        """Compute the loss of the rows and keep its terms in `last`."""
        if states.shape[:2] != target.shape:
            raise ValueError(
                f"`labels` must have shape {tuple(states.shape[:2])}, one per position; "
                f"got {tuple(target.shape)}"
            )
        if ref is not None:
            ref, row_weight = beside(ref, target, row_weight, self.reference)
            if self.ref_every > 1:
                weight = target != IGNORE_INDEX if row_weight is None else row_weight
                row_weight = weight * self.ref_every
        terms = self.path.loss(
            states,
            target.flatten(),
            None if ref is None else self.safety_tokens.ids_on(target.device),
            None if ref is None else ref.flatten(0, 1),
            penalty=self.penalty,
            safety_row_weight=None if row_weight is None else row_weight.flatten().float(),
            num_items=num_items,
            num_safety_items=num_items,
            metrics=metrics,
        )
        self.last = terms.detach()
        return terms.loss

    @not_compiled
    def _with_loss(self, output: Any, loss: Tensor) -> Any:
        """Put the loss into the model's output, and drop logits that cover one position only."""
        # A new object, since setting a field that was None would put it last in the tuple.
        # Logits of one position are dropped, since they could be mistaken for the batch's.
        fields = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
        fields["loss"] = loss + auxiliary_loss(self.inner, output)
        if not self.path.keeps_logits:
            fields["logits"] = None
        return type(output)(**fields)


def _check_no_cache(batch: dict[str, Any]) -> None:
    """Refuse a cache with labels: the student's keys are in it, and the reference adds its own."""
    for name in _CACHES:
        if batch.get(name) is not None:
            raise ValueError(f"`{name}` must be None when labels are given to an attached model")


def _check_logits_to_keep(batch: dict[str, Any]) -> None:
    keep = batch.get("logits_to_keep")
    if keep is not None and not (isinstance(keep, int) and keep == 0):
        raise ValueError("`logits_to_keep` must be 0 when labels are given to an attached model")


@not_compiled
def _as_tensor(number: Any, device: torch.device) -> Tensor:  # ()
    """Return a count as a tensor on the device, without copying a Python number from the host."""
    if isinstance(number, Tensor):
        return number.to(device, non_blocking=True)
    return torch.full((), number, device=device)


@not_compiled
def _count(target: Tensor) -> Tensor:  # ()
    return (target != IGNORE_INDEX).sum()
