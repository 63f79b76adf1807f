"""The anchors' own pass inside an attached model's forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..contracts import IGNORE_INDEX, SafetyLoss, SafetyPenalty
from ..penalties import ON_LOG_PROBS
from .anchors import AnchorBatch, AnchorPrompts
from .hf_models import ignores_padding, not_compiled, runs_the_model
from .loss_paths import LossPath
from .references import Reference


class AnchorPass:
    """Holds the model at the step's anchors.

    A pass of its own, and not rows added to the batch: those would be padded to its length, or
    would have to be packed with it. The reference's logits on each anchor are computed when it is
    first drawn, and kept.
    """

    def __init__(
        self, anchors: AnchorPrompts, inner: nn.Module, path: LossPath, reference: Reference
    ) -> None:
        self.anchors = anchors
        self.inner = inner
        self.path = path
        self.reference = reference
        self.together = ignores_padding(inner)  # in one batch, or each by itself
        self.step = 0
        self.last: SafetyLoss | None = None
        self._counts_steps = True
        self._version: int | None = None
        self._known: dict[tuple[int, bool], Tensor] = {}  # (place, log_probs) -> (held, K)

    def set_step(self, step: int) -> None:
        """Say which optimizer step it is, from here on by the caller."""
        self.step = step
        self._counts_steps = False

    @runs_the_model
    def __call__(
        self,
        forward: Callable[..., Any],
        batch: dict[str, Any],
        ids: Tensor,  # (K,)
        penalty: SafetyPenalty,
        share: Tensor,  # () of the step's labels, those of this batch
    ) -> Tensor:
        """Return what the anchors add to the loss of a batch."""
        self._count_step()
        places = self.anchors.draw(self.step)
        states, refs = [], []
        for part in [places] if self.together else [[place] for place in places]:
            anchors = self.anchors.batch(part, ids.device)
            like = {"input_ids": anchors.input_ids, "attention_mask": anchors.attention_mask}
            for name in batch:  # which Gemma 3 wants while it trains
                if name.endswith("token_type_ids"):
                    like[name] = torch.zeros_like(anchors.input_ids)
            refs.append(
                self._reference_rows(part, anchors, like, ids, penalty.kind in ON_LOG_PROBS)
            )
            _, found = self.path.run(forward, {**like, "return_dict": True})
            states.append(found[anchors.held.to(found.device)])
        return self._loss(torch.cat(states), torch.cat(refs), ids, penalty, share)

    @not_compiled
    def _loss(
        self, states: Tensor, ref: Tensor, ids: Tensor, penalty: SafetyPenalty, share: Tensor
    ) -> Tensor:  # (P, D or V), (P, K)
        count = states.shape[0]
        weight = (share * (self.anchors.weight / count)).float().to(states.device)
        target = torch.full((count,), IGNORE_INDEX, device=states.device)
        terms = self.path.loss(
            states.unsqueeze(0), target, ids, ref, penalty=penalty,
            safety_row_weight=weight.expand(count), num_items=1, num_safety_items=1,
        )  # fmt: skip
        self.last = terms.detach()
        return terms.loss

    def _reference_rows(
        self,
        places: list[int],
        anchors: AnchorBatch,
        like: dict[str, Tensor],
        ids: Tensor,
        log_probs: bool,
    ) -> Tensor:  # (P, K)
        if any((place, log_probs) not in self._known for place in places):
            # All of them, and not the new ones alone: the same rows in the same batch as the
            # student's give the same bits, and the penalty of the first step is exactly 0.
            values = self.reference(ids, dict(like), log_probs)
            for row, place in enumerate(places):
                held = anchors.held[row].to(values.device)
                self._known[place, log_probs] = values[row, : held.shape[0]][held].to(ids.device)
        return torch.cat([self._known[place, log_probs] for place in places])

    @not_compiled
    def _count_step(self) -> None:
        """Take the step as done when an optimizer has written to what is trained."""
        if not self._counts_steps:
            return
        version = sum(p._version for p in self.inner.parameters() if p.requires_grad)
        if self._version is not None and version != self._version:
            self.step += 1
        self._version = version
