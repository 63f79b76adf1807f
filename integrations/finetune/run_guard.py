"""Watches a run: numbers that are not finite, signals, checkpoints, progress."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from .run_folder import seal


class NotFinite(ValueError):
    """A loss, a term or a gradient of a step is NaN or infinite; the weights were not updated."""


class Stopped(Exception):
    """A signal ended a run, which has a checkpoint of its last step.

    Attributes:
        number: the signal's number.
        step: number of optimizer steps done.
    """

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step
        super().__init__(f"{signal.Signals(number).name} after step {step}")


class RunGuard(TrainerCallback):
    """Stops a run at a signal, and before a number that is not finite reaches the weights.

    Args:
        where: names the rows of DATA in a batch, for the message.
        on_step: called with the number of steps done.
    """

    def __init__(
        self,
        where: Callable[[Tensor], str] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        self.where = where
        self.on_step = on_step
        self.signal: int | None = None
        self.scales_gradients = False  # as in float16, where the first steps overflow on purpose
        self._seen: dict[str, Tensor] = {}  # sums over the micro-steps of a step
        self._rows: list[Tensor] = []

    def note(self, terms: dict[str, Tensor], input_ids: Tensor) -> None:
        """Keep a micro-step's terms and rows until the step ends."""
        for name, value in terms.items():
            value = value.detach().float()
            self._seen[name] = self._seen[name] + value if name in self._seen else value
        self._rows.append(input_ids)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise before a step in which a term or a gradient is not finite."""
        seen, rows = self._seen, self._rows
        self._seen, self._rows = {}, []
        model, step = kwargs["model"], state.global_step + 1
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if grads and not self.scales_gradients:
            largest: Any = nn.utils.get_total_norm(grads, math.inf)
            seen["a gradient"] = getattr(largest, "full_tensor", lambda: largest)()
        device = next(iter(seen.values())).device if seen else None
        found = [value.float().to(device) for value in seen.values()]
        # in one tensor, so that the device is waited for only once
        values = torch.stack(found).tolist() if found else []
        broken = [
            name for name, value in zip(seen, values, strict=True) if not math.isfinite(value)
        ]
        if broken:
            of = "" if self.where is None else f", rows {', '.join(map(self.where, rows))}"
            raise NotFinite(
                f"{broken[0]} is not finite at step {step}{of}; that step was not made. A lower "
                "`learning_rate` may help"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report progress, and end the run with a checkpoint if a signal arrived."""
        if self.on_step is not None:
            self.on_step(state.global_step)
        if self.signal is not None:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the checkpoint's manifest."""
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """On SIGINT or SIGTERM end the run after this step; a second signal ends it at once."""
        if threading.current_thread() is not threading.main_thread():  # signals go to the main one
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def stop(number: int, frame: Any) -> None:
            self.signal = number
            os.write(2, b"\nstopping with a checkpoint after this step; once more stops at once\n")
            for one, handler in before.items():
                signal.signal(one, handler)

        for number in before:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
