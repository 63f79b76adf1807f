"""Other losses that the study compares with, in plain PyTorch.

Two of them constrain more of the model at the anchors than its safety tokens: all logits, or the
hidden state. The third, constrained fine-tuning, constrains the first tokens of every answer.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import Trainer

from ..anchors import AnchorPrompts
from ..models import adapters_off, evaluation_mode, shift

Ceiling = Literal["full_kl", "hidden", "constrained"]
# beta for the answer's first token, the next four, and the others: arXiv:2406.05946
_BETAS = (0.5, 2.0, 0.1)


class CeilingTrainer(Trainer):
    """Trainer that adds a term to the model's own loss, or replaces it.

        full_kl      weight * mean over the anchors of KL(reference || model), all V logits
        hidden       weight * mean over the anchors of |h - h_ref|^2 / |h_ref|^2, h before the head
        constrained  mean over labels of -2 / beta_t log sigmoid(beta_t log(p / p_ref)) instead of
                     the cross-entropy

    Args:
        args: as for Trainer.
        ceiling: which of the three losses.
        anchors: the anchors; None for "constrained".
        weight: of the added term in the first two.
        kwargs: as for Trainer.

    References:
        Constrained fine-tuning: Qi et al. 2024, arXiv:2406.05946. The hidden state: the idea of
        safety anchors in representation space.
    """

    def __init__(
        self,
        *args: Any,
        ceiling: Ceiling,
        anchors: AnchorPrompts | None,
        weight: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.ceiling = ceiling
        self.anchors = anchors
        self.weight = weight

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the loss of one batch."""
        if self.ceiling == "constrained":
            return self._constrained(model, inputs)
        loss: Tensor = model(**inputs).loss
        if self.anchors is None:
            raise ValueError(f"`anchors` must be given for {self.ceiling!r}; got None")
        at = self.anchors.batch(self.anchors.draw(self.state.global_step), loss.device)
        batch = {"input_ids": at.input_ids, "attention_mask": at.attention_mask}
        with torch.no_grad(), evaluation_mode(model), adapters_off(model):
            ref = _states(model, batch, at.held)
        now = _states(model, batch, at.held)
        if self.ceiling == "hidden":
            return loss + self.weight * ((now - ref).square().sum(1) / ref.square().sum(1)).mean()
        head = model.get_output_embeddings()
        q, p = (head(x.to(head.weight.dtype)).float().log_softmax(-1) for x in (ref, now))
        divergence: Tensor = (q.exp() * (q - p)).sum(1).mean()
        return loss + self.weight * divergence

    def _constrained(self, model: Any, inputs: Any) -> Tensor:
        inputs = dict(inputs)
        target = shift(inputs.pop("labels"))
        kept = target != -100
        with torch.no_grad(), evaluation_mode(model), adapters_off(model):
            ref = _log_p(model, inputs, target, kept)
        gap = _log_p(model, inputs, target, kept) - ref
        place = kept.cumsum(1)[kept]  # 1 at the first label: these rows have one answer each
        first, next_four, rest = (torch.full_like(gap, beta) for beta in _BETAS)
        beta = torch.where(place == 1, first, torch.where(place <= 5, next_four, rest))
        return -(2 / beta * logsigmoid(beta * gap)).mean()


def _states(model: Any, batch: dict[str, Tensor], held: Tensor) -> Tensor:  # (P, D) float32
    inner: nn.Module = model.get_base_model()
    hidden: Tensor = inner.model(**batch).last_hidden_state  # type: ignore[operator]
    return hidden.flatten(0, 1).index_select(0, held).float()


def _log_p(model: Any, inputs: Any, target: Tensor, kept: Tensor) -> Tensor:  # (labels,)
    head = model.get_output_embeddings()
    hidden = model.get_base_model().model(**inputs).last_hidden_state[kept]
    log_p: Tensor = head(hidden).float().log_softmax(-1)
    return log_p.gather(1, target[kept][:, None])[:, 0]
