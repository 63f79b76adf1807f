"""A hook on every optimizer that does not keep its owner alive, and is copied with it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any


class OptimizerHook:
    """Base of objects whose `_on_step` runs at each step of any torch.optim.Optimizer."""

    register: Callable[[Callable[..., None]], Any]
    """register_optimizer_step_pre_hook or register_optimizer_step_post_hook, as a staticmethod."""

    _handle: Any = None

    def _on_step(self, optimizer: Any, *_: Any) -> None:
        raise NotImplementedError

    def open(self) -> None:
        """Start to watch the optimizers' steps."""
        method = weakref.WeakMethod(self._on_step)  # the list of hooks lives as long as the process

        def call(optimizer: Any, *_: Any) -> None:
            found = method()
            if found is not None:
                found(optimizer)

        self._handle = self.register(call)
        weakref.finalize(self, self._handle.remove)

    def close(self) -> None:
        """Stop watching."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": self._handle is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        is_open = state.pop("_handle", False)
        self.__dict__.update(state)
        if is_open:
            self.open()
