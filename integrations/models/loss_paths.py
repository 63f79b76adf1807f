"""Two ways to compute the loss of a model: from the hidden states before its head, or from logits.

Both run a forward and compute safety logits and loss from its result. HeadPath uses the hidden
states, and saves memory since the full logits never exist. LogitsPath uses the model's own logits,
for models and adapters whose head HeadPath cannot read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ...attach_options import PathName
from ...op import (
    SafetyLoss,
    accumulation_dtype,
    project,
    safety_cross_entropy,
    safety_linear_cross_entropy,
    safety_log_probs,
)
from .heads import Tap
from .modes import not_compiled, runs_the_model
from .probe import check_same_head, probe_head, probe_logits
from .sharded_weights import in_memory


class LossPath(ABC):
    """Runs a model's forward and computes the loss; one object per model.

    Its "states" are the hidden states or the logits, as the subclass has it.
    """

    keeps_logits: bool

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """V, the width of the logits."""

    @property
    def device(self) -> torch.device | None:
        """Where the loss is computed; None means where the states are."""
        return None

    def open(self) -> None:  # noqa: B027 - most need nothing
        """Install the hooks that are needed while the model is attached."""

    def close(self) -> None:  # noqa: B027
        """Remove them."""

    @abstractmethod
    def run(self, forward: Callable[..., Any], batch: dict[str, Any]) -> tuple[Any, Tensor]:
        """Call the forward; return its output and the states (B, T, D or V)."""

    @abstractmethod
    def safety_logits(self, states: Tensor, ids: Tensor, log_probs: bool) -> Tensor:
        """Return the logits (or log-probabilities) of the ids, (B, T, K)."""

    @abstractmethod
    def loss(
        self, states: Tensor, target: Tensor, ids: Tensor | None, ref: Tensor | None, **options: Any
    ) -> SafetyLoss:
        """Return the loss from states, target (B * T,) and the reference's logits (B * T, K)."""


def make_path(model: nn.Module, path: PathName, chunk_bytes: int | None, backend: str) -> LossPath:
    """Probe a model and return its loss path; a ValueError says why the path cannot be used."""
    if path == "linear":
        return HeadPath(model, chunk_bytes, backend)
    return LogitsPath(model, backend)


class HeadPath(LossPath):
    """Computes the loss from hidden states, with the logits of a chunk of rows at a time."""

    keeps_logits = False

    def __init__(
        self, model: nn.Module, chunk_bytes: int | None = None, backend: str = "auto"
    ) -> None:
        self._model = model
        self.head = probe_head(model)
        self._tap = Tap(self.head.module)
        self._run_as: dict[str, Any] = {"chunk_bytes": chunk_bytes, "backend": backend}
        self._transform: dict[str, Any] = {
            "logit_scale": self.head.logit_scale,
            "softcap": self.head.softcap,
        }

    @property
    @override
    def vocab_size(self) -> int:
        return self.head.vocab_size

    @property
    @override
    def device(self) -> torch.device | None:
        return self.head.device

    @override
    def open(self) -> None:
        self._tap.open()

    @override
    def close(self) -> None:
        self._tap.close()

    @override
    @runs_the_model
    def run(self, forward: Callable[..., Any], batch: dict[str, Any]) -> tuple[Any, Tensor]:
        check_same_head(self._model, self.head)
        with self._tap:
            output = forward(**batch)
        return output, self._tap.take().to(self.head.device)

    @override
    @not_compiled
    def safety_logits(self, states: Tensor, ids: Tensor, log_probs: bool) -> Tensor:
        rows = states.flatten(0, 1)
        with in_memory(self.head.module):
            weight, *_ = operands = self.head.operands(rows)
            options = {**operands.extras, **self._transform}
            if log_probs:
                values = safety_log_probs(rows, weight, ids, **options, **self._run_as)
            else:
                values = project(rows, weight, ids, **options)
        by_batch: Tensor = values.unflatten(0, states.shape[:2])
        return by_batch

    @override
    @not_compiled
    def loss(
        self, states: Tensor, target: Tensor, ids: Tensor | None, ref: Tensor | None, **options: Any
    ) -> SafetyLoss:
        rows = states.flatten(0, 1)
        with in_memory(self.head.module):
            weight, *_ = operands = self.head.operands(rows)
            return safety_linear_cross_entropy(
                rows, weight, target, ids, ref,
                **operands.extras, **self._transform, **self._run_as, **options,
            )  # fmt: skip


class LogitsPath(LossPath):
    """Computes the loss from all logits, as the model returns them."""

    keeps_logits = True

    def __init__(self, model: nn.Module, backend: str = "auto") -> None:
        self._vocab_size = probe_logits(model)
        self._backend = backend

    @property
    @override
    def vocab_size(self) -> int:
        return self._vocab_size

    @override
    @runs_the_model
    def run(self, forward: Callable[..., Any], batch: dict[str, Any]) -> tuple[Any, Tensor]:
        output = forward(**batch)
        return output, output.logits

    @override
    @not_compiled
    def safety_logits(self, states: Tensor, ids: Tensor, log_probs: bool) -> Tensor:
        wide = accumulation_dtype(states.dtype)
        values = states[..., ids.to(states.device)].to(wide)
        if log_probs:  # one row of the batch at a time, to avoid a second copy of all logits
            values = values - torch.stack([row.to(wide).logsumexp(-1, True) for row in states])
        return values

    @override
    @not_compiled
    def loss(
        self, states: Tensor, target: Tensor, ids: Tensor | None, ref: Tensor | None, **options: Any
    ) -> SafetyLoss:
        rows = states.flatten(0, 1)
        return safety_cross_entropy(rows, target, ids, ref, backend=self._backend, **options)
