"""Raises where what is trained gets no gradient any more, before the optimizer steps without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook


class GradientWatch:
    """Looks, before each step of an optimizer of the model's weights, at which have a gradient.

    A layer that lost its backward cuts off all that is below it while the loss looks healthy. That
    no weight has a gradient where some had one, or that one has none though its module was run
    again, is such a loss; that one has none in a single step may be a mixture's routing.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.forwards = 0  # training forwards since the last step
        self._had: set[str] = set()
        self._ran: set[str] = set()  # of those that had none: whose module ran since
        self._hooks: list[Any] = []
        self._step_hook: Any = None

    def open(self) -> None:
        """Watch the optimizers' steps."""
        self._step_hook = register_optimizer_step_pre_hook(self._look)

    def close(self) -> None:
        """Watch no longer."""
        self._suspect(set())
        if self._step_hook is not None:
            self._step_hook.remove()
        self._step_hook = None

    def _look(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        ours = {
            name: parameter.grad is not None
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and id(parameter) in stepped
        }
        if not ours or not self.forwards:
            return
        got = {name for name, has in ours.items() if has}
        lost = self._had & (ours.keys() - got)
        if lost and (not got or lost & self._ran):
            worst = sorted(lost & self._ran or lost)
            raise RuntimeError(
                f"{len(lost)} of {len(ours)} trained weights have no gradient in this step though "
                f"they had one before: {', '.join(worst[:3])}{' ...' if len(worst) > 3 else ''}. A "
                "layer above them has no backward any more, as bitsandbytes' 4-bit layers have "
                "not once they were run in eval mode on a CPU: load the model anew"
            )
        self._had |= got
        self.forwards = 0
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
        def note(module: nn.Module, *_: Any) -> None:
            if module.training:
                self._ran.add(name)

        return note
