"""The separate pass of the anchors inside an attached model's forward."""

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
    """Computes the penalty at the anchors of a step, in a pass of their own.

    As rows of the batch, anchors would have to be padded to its length or packed with it. The
    reference runs only when a step has an anchor that it has not seen; its logits are kept. Every
    micro-step runs the pass.
    """

    register = staticmethod(register_optimizer_step_post_hook)

    def __init__(
        self, anchors: AnchorPrompts, inner: nn.Module, path: LossPath, reference: Reference
    ) -> None:
        self.anchors = anchors
        self.inner = inner
        self.path = path
        self.reference = reference
        self.together = ignores_padding(inner)  # all anchors in one batch, or one at a time
        self.step = 0
        self.last: SafetyLoss | None = None
        self._counts_steps = True
        self._stepped = False
        self._is_known = False  # whether an optimizer of the trained weights was seen
        self._version: int | None = None
        self._drawn: tuple[Any, list[tuple[list[int], AnchorBatch]]] | None = None
        self._known: dict[tuple[int, bool], Tensor] = {}  # (place, log_probs) -> (held, K)
        self._penalty: tuple[SafetyPenalty, SafetyPenalty] | None = None  # rows', anchors'

    def set_step(self, step: int) -> None:
        """Set the optimizer step; from now on the caller counts the steps."""
        self.step = step
        self._counts_steps = False

    @runs_the_model
    def __call__(
        self,
        forward: Callable[..., Any],
        batch: dict[str, Any],
        ids: Tensor,  # (K,)
        penalty: SafetyPenalty,
        share: Tensor,  # () this batch's fraction of the step's labels
    ) -> Tensor:
        """Return the anchors' term of the loss of a batch."""
        states, refs, weights = [], [], []
        penalty = self._own(penalty)
        self.reference.check()  # here, since it may not run: it runs only for new anchors
        log_probs = penalty.kind in ON_LOG_PROBS
        for places, anchors in self._next(ids.device):
            like = {"input_ids": anchors.input_ids, "attention_mask": anchors.attention_mask}
            for name in batch:  # Gemma 3 needs them in training
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
        # All positions, though only the held ones count: the reference's logits come from a product
        # with as many rows, and only products of the same shape round to the same bits.
        weight = weight * share.to(weight.device) / weight.sum()
        target = torch.full_like(weight, IGNORE_INDEX, dtype=torch.int64)
        terms = self.path.loss(
            states.unsqueeze(0), target, ids, ref, penalty=penalty,
            safety_row_weight=weight.float(), num_items=1, num_safety_items=1,
        )  # fmt: skip
        self.last = terms.detach()
        return terms.loss

    def _own(self, penalty: SafetyPenalty) -> SafetyPenalty:
        """Return the penalty with the anchors' weight; cached until the rows' penalty changes."""
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
            # All anchors, not only the new ones: with the same batch as the student's the logits
            # are the same in every bit, and the first step's penalty is exactly 0.
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
        """Return the anchors of this step, in one batch or one at a time."""
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
        # DeepSpeed and others give the optimizer copies of the weights, and write them back
        # uncounted. Until an optimizer of the weights themselves is seen, any one may be it.
        self._is_known = self._is_known or ours
        self._stepped = self._stepped or ours or not self._is_known

    def _count_step(self) -> None:
        """Count a step if an optimizer made one or something else wrote to the trained weights.

        Both are needed: fused optimizers write without raising a tensor's version, and loops
        without a torch.optim.Optimizer call no hook.
        """
        if not self._counts_steps:
            return
        version = sum(p._version for p in self.inner.parameters() if p.requires_grad)
        written = self._version is not None and version != self._version
        if self._stepped or written:
            self.step += 1
        self._version, self._stepped = version, False


def _check_checkpointing(inner: nn.Module) -> None:
    """Refuse reentrant gradient checkpointing on several ranks.

    It runs a backward for each of the two forwards. DDP reduces a gradient when it is first ready,
    and so would not reduce the second part.
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
