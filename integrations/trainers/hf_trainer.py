"""transformers' Trainer with the safety loss: attached during train(), with its terms logged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from ...tokens import SafetyTokens
from ..attach import KEYWORDS, SafetyHandle, attach
from ..models import keep_4bit_layers_training

TOKENS_FILE = "safety_tokens.json"
# without `tokenizer`, which the trainer has, and which may be a keyword of its own
_OF_ATTACH = tuple(name for name in KEYWORDS if name != "tokenizer")


class _AttachWhenPrepared(TrainerCallback):
    """Attaches when training begins, after the trainer has prepared the model."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Attach the model."""
        self._function()


class SafetyTrainerMixin:
    """Mixin that makes transformers' Trainer, or a subclass, train with the safety loss.

    Put it before the trainer's class among the bases. It attaches the model during train(), and
    adds to the trainer's own log entries:

    - `safety/ce`: nats.
    - `safety/penalty`: of the rows, in the unit of its kind.
    - `safety/anchor_penalty`: the mean over the anchors, if there are any.
    - `safety/max_drift`: the largest drift, in logits, anchors included.

    The terms are averaged, and the drift is the maximum, over the ranks and over the steps since
    the last entry. The values stay on the device until they are logged.
    """

    safety: SafetyHandle | None = None
    """The attached model's handle; None before train() attaches."""

    args: Any
    model: nn.Module
    state: Any
    compute_loss_func: Any
    model_accepts_loss_kwargs: bool
    accelerator: Any
    get_tp_size: Any
    add_callback: Any
    remove_callback: Any
    _sums: dict[str, Tensor]  # of the micro-steps since the last log
    _worst: Tensor | None  # () the largest max_drift since then
    _micro_steps: int
    _has_num_items: bool
    _step_of_last_log: int

    def __init__(
        self, *args: Any, safety_tokens: SafetyTokens | None = None, **kwargs: Any
    ) -> None:
        self.attach_options = {name: kwargs.pop(name) for name in _OF_ATTACH if name in kwargs}
        self.safety_tokens = safety_tokens
        super().__init__(*args, **kwargs)
        self._start_sums()
        self._has_num_items = False
        if getattr(self, "model_init", None) is not None:
            raise ValueError(
                "`model_init` must be None: train() would make another model than the attached one"
            )
        _check_liger(self.args)
        if self.args.label_smoothing_factor or self.compute_loss_func is not None:
            raise ValueError(
                "`label_smoothing_factor` and `compute_loss_func` must be off: with either Trainer "
                "makes the loss itself, without the penalty"
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the trainer does, with the model attached until it returns."""
        later = _AttachWhenPrepared(self._attach) if is_deepspeed_zero3_enabled() else None
        self.safety = None
        try:
            if later is None:
                self._attach()
            else:  # ZeRO-3 shards the parameters: they can be read once DeepSpeed is set up
                self.add_callback(later)
            self._start_sums()
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            if later is not None:
                self.remove_callback(later)
            self._detach()

    def _attach(self) -> None:
        if self.safety is not None:  # Trainer starts over with a smaller batch
            return
        self._check_split_rows()
        tokens: Any = self.safety_tokens
        processing = getattr(self, "processing_class", None)
        options = {"tokenizer": getattr(processing, "tokenizer", processing), **self.attach_options}
        self.safety = attach(self.model, tokens, **options)

    def _check_split_rows(self) -> None:
        """Refuse options that need whole rows where a rank sees only a part of each row."""
        if (parts := getattr(self, "get_sp_size", lambda: 1)()) > 1:
            raise ValueError(
                "`sp_size` must be 1: with more, Trainer weighs each rank's loss by its labels "
                f"after the model, and the terms would not be those of the loss; got {parts}"
            )
        if (parts := getattr(self, "get_cp_size", lambda: 1)()) == 1:
            return
        given = {"positions": "none", **self.attach_options}
        for name, allowed in (("anchors", None), ("ref_tokens", None), ("positions", "response")):
            value = given.get(name)
            if value is not None and value != allowed:
                raise ValueError(
                    f"`{name}` must be {allowed!r} under context parallelism, where a rank sees a "
                    f"part of each row; got {value!r:.60} and `cp_size` {parts}"
                )

    def _detach(self) -> None:
        if self.safety is not None:
            self.safety.remove()

    def prepare_step(self, inputs: Any, num_items_in_batch: Any) -> None:
        """Prepare a step before its loss is computed; for subclasses to override."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Compute the trainer's loss and keep its terms, without waiting for the device."""
        if model.training and self.safety is None:
            raise RuntimeError("a training step outside of train() would have no safety loss")
        handle = self.safety if model.training else None
        kwargs = {
            "return_outputs": return_outputs,
            "num_items_in_batch": num_items_in_batch,
            **kwargs,
        }
        if handle is None:
            return super().compute_loss(model, inputs, **kwargs)  # type: ignore[misc]
        before = handle.last
        handle.step = self.state.global_step  # so that a resumed run gets the same anchors
        self.prepare_step(inputs, num_items_in_batch)
        loss = super().compute_loss(model, inputs, **kwargs)  # type: ignore[misc]
        if handle.last is None or handle.last is before:
            raise RuntimeError(
                "this step made no safety loss: its batch must have labels, and train() must run"
            )
        self._has_num_items = num_items_in_batch is not None and self.model_accepts_loss_kwargs
        self._keep(handle)
        return loss

    def prediction_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the trainer does, and keep 4-bit layers trainable."""
        keep_4bit_layers_training(model)
        return super().prediction_step(model, *args, **kwargs)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save as the trainer does, with the safety tokens beside the model."""
        super().save_model(output_dir, *args, **kwargs)  # type: ignore[misc]
        if self.args.should_save and self.safety_tokens is not None and self.safety_tokens.pieces:
            self.safety_tokens.save(Path(output_dir or self.args.output_dir) / TOKENS_FILE)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the terms to entries of training steps, then log as the trainer does."""
        if "loss" in logs and self._sums and self._worst is not None:
            *means, worst = self._over_ranks().tolist()
            logs = {
                **logs,
                **dict(zip(self._sums, means, strict=True)),
                "safety/max_drift": worst,
            }
            self._start_sums()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _over_ranks(self) -> Tensor:
        """Return the terms averaged over the steps since the last log, and the largest drift."""
        # Terms divided by num_items_in_batch are summed over the micro-steps of a step, and over
        # the ranks if it counts their labels too. Terms divided by their own labels are averaged.
        steps = max(1, self.state.global_step - self._step_of_last_log)
        terms = torch.stack(list(self._sums.values()))
        terms = terms / (steps if self._has_num_items else self._micro_steps)
        worst = torch.stack([terms.new_zeros(()) if self._worst is None else self._worst])
        ranks = self.accelerator.num_processes
        if ranks > 1:
            across = self._has_num_items and self.args.average_tokens_across_devices
            parts = self.get_tp_size() if across else ranks  # the ranks of one TP group agree
            terms = self.accelerator.reduce(terms, "sum") / parts
            worst = self.accelerator.gather(worst).amax(dim=0, keepdim=True)
        return torch.cat([terms, worst])

    def _keep(self, handle: SafetyHandle) -> None:
        terms = handle.last
        if terms is None:
            return
        if not self._sums:  # the first since the last log, or the start
            self._step_of_last_log = self.state.global_step
        drifts = [terms.max_drift]
        self._add("safety/ce", terms.ce)
        self._add("safety/penalty", terms.penalty)
        if handle.last_anchors is not None:
            self._add("safety/anchor_penalty", handle.last_anchors.penalty)
            drifts.append(handle.last_anchors.max_drift)
        worst = drifts if self._worst is None else [*drifts, self._worst]
        self._worst = torch.stack(worst).amax()
        self._micro_steps += 1

    def _start_sums(self) -> None:
        self._sums = {}
        self._worst = None
        self._micro_steps = 0
        self._step_of_last_log = self.state.global_step

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = value if name not in self._sums else self._sums[name] + value


class SafetyTrainer(SafetyTrainerMixin, Trainer):
    """Trainer that trains with the safety loss; SafetyTrainerMixin says what it logs.

    Args:
        args: positional arguments of Trainer.
        safety_tokens: the tokens whose logits the penalty compares.
        kwargs: keywords of `attach` (penalty, ref_model, reference, positions, anchors, path, ...)
            and of Trainer.

    Raises:
        ValueError: Liger's fused loss, label smoothing or a `compute_loss_func` is on, which would
            replace the safety loss; or `model_init` is given.
    """

    def __init__(self, *args: Any, safety_tokens: SafetyTokens, **kwargs: Any) -> None:
        super().__init__(*args, safety_tokens=safety_tokens, **kwargs)


def _check_liger(args: Any) -> None:
    if not getattr(args, "use_liger_kernel", False):
        return
    config = getattr(args, "liger_kernel_config", None) or {}
    if config.get("fused_linear_cross_entropy", True) or config.get("cross_entropy", False):
        raise ValueError(
            "`liger_kernel_config` must switch Liger's losses off, {'fused_linear_cross_entropy': "
            f"False, 'cross_entropy': False}}, since they would replace ours; got {config}"
        )
