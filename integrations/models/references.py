"""Where the reference's safety logits come from: adapters off, a second model, or a function.

Reference models run in eval mode without gradient, on the same path as the student (loss_paths):
on HeadPath the reference never makes the full logits.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from .adapters import (
    AT_START,
    adapter_at_start,
    adapters_off,
    check_adapters,
    check_start,
    check_student,
    keep_start,
)
from .loss_paths import LossPath
from .modes import evaluation_mode, not_compiled, runs_the_model

ReferenceFunction = Callable[[Tensor, Mapping[str, Any]], Tensor]
"""Takes the ids (K,) and the model's batch without labels; returns logits (B, T, K).

For penalty kinds "logprob" and "coarse_kl" it returns log-probabilities. Called without gradient.
"""


class Reference(ABC):
    """Returns the frozen model's logits of the safety ids for a batch."""

    @abstractmethod
    def __call__(self, ids: Tensor, batch: dict[str, Any], log_probs: bool) -> Tensor:
        """Return (B, T, K), logits or log-probabilities."""

    has_fewer_positions = False
    """Whether the student has virtual tokens in front that this reference does not have."""

    reads_tokens: int | None = None
    """How many columns of a batch it reads; None for all."""

    def check(self) -> None:  # noqa: B027
        """Raise if this is no longer a frozen reference; called even in steps without a pass."""

    def skip(self, batch: dict[str, Any]) -> None:  # noqa: B027 - most need nothing
        """Remove from a batch the columns meant for the reference, whether or not it ran."""

    def open(self) -> None:  # noqa: B027
        """Install the hooks that are needed while the student is attached."""

    def close(self) -> None:  # noqa: B027
        """Remove them."""


@runs_the_model
def read_safety_logits(
    model: nn.Module,
    forward: Callable[..., Any],
    path: LossPath,
    ids: Tensor,
    batch: dict[str, Any],
    log_probs: bool = False,
) -> Tensor:  # (B, T, K)
    """Run `forward` without gradient in eval mode and return its safety logits.

    The batch is passed on as it is. `use_cache=False` would avoid a cache that nobody uses, but
    only without a cache does transformers read restarting position_ids as packed rows, and the
    reference must see the rows as the student does.
    """
    with torch.no_grad(), evaluation_mode(model):
        _, states = path.run(forward, {**batch, "return_dict": True})
        return path.safety_logits(states, ids, log_probs)


def _address(tensor: Tensor) -> tuple[torch.device, int] | None:
    """Return where a tensor's memory begins; None if it has none (meta, or a ZeRO-3 shard)."""
    if hasattr(tensor, "placements"):  # a DTensor
        tensor = tensor.to_local()  # type: ignore[attr-defined]
    start = 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()
    return (tensor.device, start) if start else None


class _InOneModel(Reference):
    """A PeftModel that is its own reference, in a separate pass."""

    def __init__(self, peft_model: Any, inner: nn.Module, forward: Any, path: LossPath) -> None:
        self.peft_model = peft_model
        self.inner = inner
        self.forward = forward
        self.path = path

    @runs_the_model  # else torch.compile would take this frame, and break it
    def _read(self, ids: Tensor, batch: dict[str, Any], log_probs: bool) -> Tensor:
        return read_safety_logits(self.inner, self.forward, self.path, ids, batch, log_probs)


class AdaptersOff(_InOneModel):
    """The model's own weights with its adapters switched off."""

    def __init__(self, peft_model: Any, inner: nn.Module, forward: Any, path: LossPath) -> None:
        super().__init__(peft_model, inner, forward, path)
        try:
            with adapters_off(peft_model):
                pass
        except ValueError as error:
            raise ValueError(
                "`model` must let its adapters be switched off; pass the PeftModel, and not the "
                f"model inside it. {error}"
            ) from error

    @override
    @runs_the_model
    def __call__(self, ids: Tensor, batch: dict[str, Any], log_probs: bool) -> Tensor:
        self.check()
        with adapters_off(self.peft_model):
            return self._read(ids, batch, log_probs)

    @override
    def check(self) -> None:
        """Refuse an adapter added or a base unfrozen since: the reference would move."""
        check_adapters(self.peft_model)
        check_student(self.peft_model)


class AdaptersAtStart(_InOneModel):
    """The model with its adapters as they were when it was attached, kept as a second adapter."""

    def __init__(self, peft_model: Any, inner: nn.Module, forward: Any, path: LossPath) -> None:
        super().__init__(peft_model, inner, forward, path)
        keep_start(peft_model)

    @override
    def close(self) -> None:
        if AT_START in self.peft_model.peft_config:
            self.peft_model.delete_adapter(AT_START)

    @override
    @runs_the_model
    def __call__(self, ids: Tensor, batch: dict[str, Any], log_probs: bool) -> Tensor:
        self.check()
        with adapter_at_start(self.peft_model):
            return self._read(ids, batch, log_probs)

    @override
    def check(self) -> None:
        """Refuse a base unfrozen since."""
        check_start(self.peft_model)
        check_student(self.peft_model)


class PromptOff(_InOneModel):
    """The model without the virtual tokens that prompt learning puts before the input.

    The inner model's batch has them already, as embeddings or in the cache. So the reference gets
    the batch that the PeftModel was called with.
    """

    has_fewer_positions = True

    def __init__(self, peft_model: Any, inner: nn.Module, forward: Any, path: LossPath) -> None:
        super().__init__(peft_model, inner, forward, path)
        self._outer: dict[str, Any] | None = None
        self._hooks: list[Any] = []

    @override
    def open(self) -> None:
        self._hooks = [
            self.peft_model.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.peft_model.register_forward_hook(self._leave, always_call=True),
        ]

    @override
    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._outer = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        self._outer.update(self._outer.pop("kwargs", {}))

    def _leave(self, *_: Any) -> None:
        self._outer = None

    @override
    @runs_the_model
    def __call__(self, ids: Tensor, batch: dict[str, Any], log_probs: bool) -> Tensor:
        check_adapters(self.peft_model)
        if self._outer is not None:
            for_peft = ("labels", "shift_labels", "num_items_in_batch", "task_ids", "return_dict")
            batch = {
                name: value
                for name, value in self._outer.items()
                if name not in for_peft and value is not None
            }
        return self._read(ids, batch, log_probs)


class FrozenModel(Reference):
    """A second, frozen model, on the same device or on another one."""

    def __init__(self, model: nn.Module, path: LossPath, student: nn.Module) -> None:
        self.model = model
        self.path = path
        self.student = student
        self.check()

    @override
    @not_compiled
    def check(self) -> None:
        """Refuse a reference that shares memory with weights that the student trains."""
        own = {_address(parameter) for parameter in self.model.parameters()} - {None}
        for name, parameter in self.student.named_parameters():
            if parameter.requires_grad and _address(parameter) in own:
                raise ValueError(
                    "`ref_model` must share no trainable parameter with `model`, it would move "
                    f"with it; shared is {name}"
                )

    @override
    def open(self) -> None:
        self.path.open()

    @override
    def close(self) -> None:
        self.path.close()

    @override
    @runs_the_model
    def __call__(self, ids: Tensor, batch: dict[str, Any], log_probs: bool) -> Tensor:
        self.check()  # the student may have been unfrozen since
        device = self.path.device or next(self.model.parameters()).device
        moved = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        return read_safety_logits(
            self.model, self.model.forward, self.path, ids.to(device), moved, log_probs
        ).to(ids.device)


class CallableReference(Reference):
    """The caller's own function, whose result is checked at each step."""

    def __init__(self, function: ReferenceFunction) -> None:
        self.function = function

    @override
    @runs_the_model
    def __call__(self, ids: Tensor, batch: dict[str, Any], log_probs: bool) -> Tensor:
        with torch.no_grad():
            values = self.function(ids, batch)
        if not isinstance(values, Tensor) or not values.is_floating_point():
            raise TypeError(f"`reference` must return a floating-point tensor; got {values!r}")
        if values.dim() != 3 or values.shape[2] != len(ids):
            raise ValueError(
                f"`reference` must return (B, T, {len(ids)}), a logit per position and safety id; "
                f"got {tuple(values.shape)}"
            )
        if log_probs and values.device.type == "cpu" and bool((values > 1e-3).any()):
            raise ValueError(
                "`reference` must return log-probabilities for this kind of penalty, as "
                f"safety_log_probs makes them; got values up to {float(values.max()):.3g}"
            )
        return values.detach().to(ids.device)


class Shortened(Reference):
    """Wraps a reference so that it reads only the first columns of each batch, which is cheaper."""

    def __init__(self, reference: Reference, tokens: int) -> None:
        self.reference = reference
        self.reads_tokens = tokens

    @override
    def open(self) -> None:
        self.reference.open()

    @override
    def close(self) -> None:
        self.reference.close()

    @override
    def check(self) -> None:
        self.reference.check()

    @override
    @runs_the_model
    def __call__(self, ids: Tensor, batch: dict[str, Any], log_probs: bool) -> Tensor:
        given = [batch.get(name) for name in ("input_ids", "inputs_embeds")]
        length = next((x.shape[1] for x in given if isinstance(x, Tensor)), 0)
        _check_apart(batch)
        cut = {name: self._cut(name, value, length) for name, value in batch.items()}
        values = self.reference(ids, cut, log_probs)
        # NaN, so that a position that was not read cannot pass as one without drift
        return nn.functional.pad(values, (0, 0, 0, length - values.shape[1]), value=torch.nan)

    def _cut(self, name: str, value: Any, length: int) -> Any:
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] != length:
            if isinstance(value, Tensor) and value.dim() > 1 and length in value.shape:
                raise ValueError(
                    f"`ref_tokens` must be None for batches with `{name}` of shape "
                    f"{tuple(value.shape)}: its columns are not in the second place"
                )
            return value
        return value[:, : self.reads_tokens]


def _check_apart(batch: dict[str, Any]) -> None:
    """Refuse packed rows, since the later ones would be cut off entirely."""
    positions = batch.get("position_ids")
    packed = any(name.startswith("cu_seq_lens") for name in batch)
    if isinstance(positions, Tensor) and positions.dim() == 2 and positions.device.type == "cpu":
        packed = packed or bool((positions[:, 1:] < positions[:, :-1]).any())
    if packed:
        raise ValueError("`ref_tokens` must be None for packed rows: it would cut off whole rows")
