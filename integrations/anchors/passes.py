"""The anchors' own pass inside an attached model's forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from typing_extensions import override

from ...op import IGNORE_INDEX, ON_LOG_PROBS, SafetyLoss, SafetyPenalty
from ..models import (
    LossPath,
    OptimizerHook,
    Reference,
    ignores_padding,
    not_compiled,
    runs_the_model,
)
from .prompts import AnchorBatch, AnchorPrompts


class AnchorPass(OptimizerHook):
    """Holds the model at the step's anchors.

    A pass of its own, and not rows added to the batch: those would be padded to its length, or
    would have to be packed with it. The reference is asked when a step has an anchor that is new,
    and what it says is kept. Every micro-step makes the pass.
    """

    register = staticmethod(register_optimizer_step_post_hook)

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
        self._stepped = False
        self._is_known = False  # whether an optimizer was seen that has the trained weights
        self._version: int | None = None
        self._drawn: tuple[Any, list[tuple[list[int], AnchorBatch]]] | None = None
        self._known: dict[tuple[int, bool], Tensor] = {}  # (place, log_probs) -> (held, K)
        self._penalty: tuple[SafetyPenalty, SafetyPenalty] | None = None  # the rows', ours

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
        states, refs, weights = [], [], []
        penalty = self._own(penalty)
        self.reference.check()  # which is asked for new anchors alone
        log_probs = penalty.kind in ON_LOG_PROBS
        for places, anchors in self._next(ids.device):
            like = {"input_ids": anchors.input_ids, "attention_mask": anchors.attention_mask}
            for name in batch:  # which Gemma 3 wants while it trains
                if name.endswith("token_type_ids"):
                    like[name] = torch.zeros_like(anchors.input_ids)
            refs.append(self._reference(places, anchors, like, ids, log_probs))
            _, found = self.path.run(forward, {**like, "return_dict": True})
            states.append(found.flatten(0, 1))
            weights.append(torch.zeros_like(refs[-1][:, 0]).index_fill_(0, anchors.held, 1.0))
        return self._loss(
            torch.cat(states), torch.cat(refs), torch.cat(weights), ids, penalty, share
        )

    @not_compiled
    def _loss(
        self,
        states: Tensor,  # (A * T, D or V)
        ref: Tensor,  # (A * T, K)
        weight: Tensor,  # (A * T,) 1 where held, else 0
        ids: Tensor,
        penalty: SafetyPenalty,
        share: Tensor,
    ) -> Tensor:
        # All positions, though those that are not held have no part: the reference's logits come
        # of a product with as many rows, and only so are equal ones equal in every bit.
        weight = weight * share.to(weight.device) / weight.sum()
        target = torch.full_like(weight, IGNORE_INDEX, dtype=torch.int64)
        terms = self.path.loss(
            states.unsqueeze(0), target, ids, ref, penalty=penalty,
            safety_row_weight=weight.float(), num_items=1, num_safety_items=1,
        )  # fmt: skip
        self.last = terms.detach()
        return terms.loss

    def _own(self, penalty: SafetyPenalty) -> SafetyPenalty:
        """Return the penalty with the anchors' own weight; made anew only where the rows' was."""
        weight = self.anchors.penalty_weight
        if weight is None:
            return penalty
        if self._penalty is None or self._penalty[0] is not penalty:
            self._penalty = penalty, penalty.with_weight(weight)
        return self._penalty[1]

    @runs_the_model
    def _reference(
        self,
        places: list[int],
        anchors: AnchorBatch,
        like: dict[str, Tensor],
        ids: Tensor,
        log_probs: bool,
    ) -> Tensor:  # (A * T, K), NaN where not held
        if any((place, log_probs) not in self._known for place in places):
            # All of them, and not the new ones alone: the same rows in the same batch as the
            # student's give the same bits, and the penalty of the first step is exactly 0.
            values = self.reference(ids, dict(like), log_probs).to(ids.device)
            at_held = values.flatten(0, 1).index_select(0, anchors.held)
            counts = [self.anchors.rows[place].held for place in places]
            for place, found in zip(places, at_held.split(counts), strict=True):
                self._known[place, log_probs] = found
        known = torch.cat([self._known[place, log_probs] for place in places])
        ref = known.new_full((anchors.input_ids.numel(), len(ids)), torch.nan)
        return ref.index_copy_(0, anchors.held, known)

    @not_compiled
    def _next(self, device: torch.device) -> list[tuple[list[int], AnchorBatch]]:
        """Return the anchors whose turn it is, in one batch or each by itself."""
        _check_checkpointing(self.inner)
        self._count_step()
        key = (self.step, device)
        if self._drawn is None or self._drawn[0] != key:  # the micro-steps of a step share them
            places = self.anchors.draw(self.step)
            parts = [places] if self.together else [[place] for place in places]
            self._drawn = key, [(part, self.anchors.batch(part, device)) for part in parts]
        return self._drawn[1]

    @override
    def _on_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not self._counts_steps:
            return
        mine = {id(p) for p in self.inner.parameters() if p.requires_grad}
        ours = any(id(p) in mine for group in optimizer.param_groups for p in group["params"])
        # DeepSpeed and others give an optimizer copies of the weights, and write back where nobody
        # counts: until one is seen to write the weights themselves, any may be theirs.
        self._is_known = self._is_known or ours
        self._stepped = self._stepped or ours or not self._is_known

    def _count_step(self) -> None:
        """Go on where an optimizer made a step, or something else wrote to what is trained.

        Fused optimizers write without counting it; loops without a torch.optim.Optimizer call no
        hook.
        """
        if not self._counts_steps:
            return
        version = sum(p._version for p in self.inner.parameters() if p.requires_grad)
        written = self._version is not None and version != self._version
        if self._stepped or written:
            self.step += 1
        self._version, self._stepped = version, False


def _check_checkpointing(inner: nn.Module) -> None:
    """Refuse reentrant checkpointing on several ranks.

    It runs backward once for each of the two forwards, so that DDP, which reduces a gradient when
    it is first ready, would leave the second part on its own rank.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    for module in inner.modules():
        if getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(function, "keywords", {}).get("use_reentrant"):
                raise ValueError(
                    "`anchors` must be None under reentrant gradient checkpointing on several "
                    "ranks: gradients would stay apart. Pass {'use_reentrant': False}"
                )
