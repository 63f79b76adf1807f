"""Raises before an optimizer step if trained weights no longer get a gradient."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from typing_extensions import override

from .modes import not_compiled
from .optimizer_hooks import OptimizerHook


class GradientWatch(OptimizerHook):
    """Checks, before each optimizer step, which of the model's weights have a gradient.

    A layer that lost its backward cuts off everything below it, while the loss looks healthy. Two
    signs of this raise: after a backward no weight has a gradient, though some had one before; or
    a weight has none though its module ran again. A weight without a gradient in a single step may
    be a mixture of experts' routing, and a step without a backward is the caller's choice.
    """

    register = staticmethod(register_optimizer_step_pre_hook)

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._backwards = 0
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._had: set[str] = set()
        self._ran: set[str] = set()  # weights that had no gradient, and whose module ran since
        self._hooks: list[Any] = []

    @not_compiled
    def note(self, loss: Tensor) -> None:
        """Count the backward of this training loss once it begins."""
        if loss.requires_grad:
            loss.register_hook(self._count)

    def _count(self, _: Tensor) -> None:
        self._backwards += 1

    @override
    def close(self) -> None:
        super().close()
        self._suspect(set())

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_hooks": [], "_seen": None}  # weak: it cannot be copied

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_seen": weakref.WeakKeyDictionary()})

    @override
    def _on_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._seen.get(optimizer, 0) == self._backwards:
            return
        self._seen[optimizer] = self._backwards
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        ours = {
            name: parameter.grad is not None
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and id(parameter) in stepped
        }
        got = {name for name, has in ours.items() if has}
        lost = self._had & (ours.keys() - got)
        if lost and (not got or lost & self._ran):
            worst = sorted(lost & self._ran or lost)
            raise RuntimeError(
                f"{len(lost)} of {len(ours)} trained weights have no gradient in this step though "
                f"they had one before: {', '.join(worst[:3])}{' ...' if len(worst) > 3 else ''}. A "
                "layer above them may have no backward any more, as bitsandbytes' 4-bit layers "
                "have not once they were run in eval mode on a CPU; then load the model anew"
            )
        self._had |= got
        self._suspect(lost)

    def _suspect(self, lost: set[str]) -> None:
        """Record which modules of these weights run in the next forwards."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._ran = [], set()
        for name in lost:
            module = self.model.get_submodule(name.rpartition(".")[0])
            self._hooks.append(module.register_forward_hook(self._noter(name)))

    def _noter(self, name: str) -> Callable[..., None]:
        ran = self._ran

        def note(module: nn.Module, *_: Any) -> None:
            if module.training:
                ran.add(name)

        return note
