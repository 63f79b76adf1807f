"""Raises where what is trained gets no gradient any more, before the optimizer steps without it."""

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
    """Looks, before each step of an optimizer of the model's weights, at which have a gradient.

    A layer that lost its backward cuts off all that is below it while the loss looks healthy. That
    no weight has a gradient after a backward where some had one, or that one has none though its
    module was run again, is such a loss; that one has none in a single step may be a mixture's
    routing, and a step without a backward is the caller's.
    """

    register = staticmethod(register_optimizer_step_pre_hook)

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._backwards = 0
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._had: set[str] = set()
        self._ran: set[str] = set()  # of those that had none: whose module ran since
        self._hooks: list[Any] = []

    @not_compiled
    def note(self, loss: Tensor) -> None:
        """Count the backward of a training loss when it begins."""
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
        """See in the next forwards which of these weights' modules run."""
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
