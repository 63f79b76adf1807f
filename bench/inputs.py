"""The inputs of every provider."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from str_kernels import project

from .steps.heads import HeadShape

WEIGHT = 0.1  # of the penalty
_ROWS_PER_BLOCK = 256  # of the reference's log-probabilities: bounds their (rows, V) in float32


@dataclass(frozen=True)
class Inputs:
    """Hidden states, a head, targets and references; hidden is a leaf with gradient."""

    hidden: Tensor  # (N, D)
    head: Tensor  # (V, D), a leaf with gradient when it is trained
    target: Tensor  # (N,)
    ids: Tensor  # (K,)
    ref: Tensor  # (N, K) float32, the reference's safety logits
    ref_hidden: Tensor  # (N, D), from which `ref` was computed
    shape: HeadShape
    ref_log_probs: Tensor | None = None  # (N, K) float32, for the penalty on log-probabilities

    def leaves(self) -> list[Tensor]:
        """Return the tensors that get a gradient."""
        return [x for x in (self.hidden, self.head) if x.requires_grad]

    def first(self, rows: int, dtype: torch.dtype | None = None) -> Inputs:
        """Return the first rows, with leaves of their own, in another dtype if one is given."""

        def copy(x: Tensor) -> Tensor:
            return x.detach().to(dtype or x.dtype).requires_grad_(x.requires_grad)

        log_probs = self.ref_log_probs
        return replace(
            self,
            hidden=copy(self.hidden[:rows]),
            head=copy(self.head),
            target=self.target[:rows],
            ref=self.ref[:rows],
            ref_hidden=self.ref_hidden[:rows].to(dtype or self.ref_hidden.dtype),
            ref_log_probs=None if log_probs is None else log_probs[:rows],
        )


def draw_inputs(
    shape: HeadShape,
    tokens: int,
    ids: int,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    *,
    train_head: bool = False,
    log_probs: bool = False,
) -> Inputs:
    """Draw random inputs with logits of about 1 that drift by about 0.5 from the reference's.

    Args:
        shape: V, D, scale and cap.
        tokens: N.
        ids: K.
        dtype: of hidden states and head.
        device: "cpu" or "cuda".
        train_head: whether the head is a leaf with gradient.
        log_probs: whether to make the reference's log-probabilities too; needs the whole head.
    """

    def normal(rows: int, scale: float) -> Tensor:
        return (torch.randn(rows, shape.width, device=device) * scale).to(dtype)

    hidden = normal(tokens, 1.0)
    head = normal(shape.vocab, shape.width**-0.5)
    ref_hidden = hidden + normal(tokens, 0.5)
    safety_ids = torch.randperm(shape.vocab, device=device)[:ids]
    scale, cap = shape.logit_scale, shape.softcap
    with torch.no_grad():
        ref = project(ref_hidden, head, safety_ids, logit_scale=scale, softcap=cap)
    return Inputs(
        hidden=hidden.requires_grad_(),
        head=head.requires_grad_(train_head),
        target=torch.randint(0, shape.vocab, (tokens,), device=device),
        ids=safety_ids,
        ref=ref,
        ref_hidden=ref_hidden,
        shape=shape,
        ref_log_probs=_log_probs(ref_hidden, head, safety_ids, shape) if log_probs else None,
    )


def full_logits(hidden: Tensor, head: Tensor, shape: HeadShape) -> Tensor:  # (N, V) float32
    """Make all logits, in float32 as transformers does."""
    z = torch.nn.functional.linear(hidden, head).float()
    if shape.logit_scale != 1.0:
        z = z * shape.logit_scale
    return torch.tanh(z / shape.softcap) * shape.softcap if shape.softcap else z


@torch.no_grad()
def _log_probs(hidden: Tensor, head: Tensor, ids: Tensor, shape: HeadShape) -> Tensor:  # (N, K)
    blocks = hidden.split(_ROWS_PER_BLOCK)
    return torch.cat([full_logits(x, head, shape).log_softmax(1)[:, ids] for x in blocks])
