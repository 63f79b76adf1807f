"""attach(): a Hugging Face causal LM trains with the safety loss, and nothing else changes."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checks import check_backend
from ..contracts import IGNORE_INDEX, SafetyLoss, SafetyPenalty
from ..functional import safety_linear_cross_entropy, safety_log_probs
from ..penalties import ON_LOG_PROBS
from ..projection import project
from ..safety_tokens import SafetyTokens
from .hf_models import Head, capture_hidden, probe_head
from .peft_adapters import base_of, check_adapters, is_peft_model
from .references import AdaptersOff, FrozenModel

Positions = Literal["response", "all"] | int
_LOSS_ARGUMENTS = ("labels", "shift_labels", "num_items_in_batch")


def attach(
    model: nn.Module,
    safety_tokens: SafetyTokens,
    *,
    penalty: SafetyPenalty | None = None,
    ref_model: nn.Module | None = None,
    positions: Positions = "response",
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> SafetyHandle:
    """Make `model(..., labels=...)` return the safety loss while training.

    In training mode with labels the model's forward computes

        loss = ce / num_items + weight * penalty / num_items     (+ the model's own auxiliary loss)

    from the hidden states, a chunk of rows at a time, with reference logits from one more pass
    without gradient. num_items is `num_items_in_batch` where the caller passes it (Trainer does)
    and else the number of labels in the batch; both sums share it, so gradient accumulation equals
    one large batch. Without labels, in eval mode and in generate() the model is unchanged.

    Args:
        model: a Hugging Face causal LM, or a PeftModel around one. Attach before it is wrapped
            by DDP, FSDP or torch.compile.
        safety_tokens: the ids to hold; their vocabulary must be the model's.
        penalty: kind and weight; the defaults of SafetyPenalty when None. Its id_weights, when
            None, are those of `safety_tokens`.
        ref_model: the frozen aligned model. None takes `model` with its adapters off, which
            costs no memory and needs a PeftModel with frozen base weights.
        positions: where the penalty is taken: "response" (every label), "all" (every position
            whose next token is not padding) or the first m labels of each response.
        chunk_bytes: memory for one chunk's logits, bytes; None picks a size for the device.
        backend: as in `safety_linear_cross_entropy`.

    Returns:
        A handle: `.last` has the terms of the last step, `.weight` can be set between steps,
        `.remove()` puts the model back; also a context manager.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the model cannot be attached to exactly; the message says why and what to use.

    Notes:
        The output's `logits` are None in training, since they are never made. nn.DataParallel,
        which Trainer falls back to with several GPUs and no launcher, does not work: use torchrun.

    References:
        Bach and Tran 2026, arXiv:2604.17210.

    Examples:
        >>> handle = attach(model, SafetyTokens.from_templates(tokenizer))  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> handle.remove()  # doctest: +SKIP
    """
    if not isinstance(safety_tokens, SafetyTokens):
        raise TypeError(f"`safety_tokens` must be SafetyTokens; got {type(safety_tokens).__name__}")
    penalty = safety_tokens.weigh(penalty)
    _check_positions(positions)
    check_backend(backend)
    inner = base_of(model)
    if isinstance(vars(inner).get("forward"), _SafetyForward):
        raise ValueError("`model` must not be attached twice; call remove() on the first handle")
    head = probe_head(inner)
    _check_vocabulary("model", head, safety_tokens)
    reference: AdaptersOff | FrozenModel
    if ref_model is not None:
        ref_inner = base_of(ref_model)
        if ref_inner is inner:
            raise ValueError("`ref_model` must be another model than `model`; got the same one")
        ref_head = probe_head(ref_inner)
        _check_vocabulary("ref_model", ref_head, safety_tokens)
        reference = FrozenModel(ref_inner, ref_head)
    elif is_peft_model(model):
        check_adapters(model)
        reference = AdaptersOff(model, inner, inner.forward, head)
    else:
        raise ValueError(
            "`ref_model` must be given for a model without adapters: the frozen aligned model to "
            "compare with (a copy made before training); got None"
        )
    forward = _SafetyForward(
        inner, head, reference, safety_tokens, penalty, positions, chunk_bytes, backend
    )
    return SafetyHandle(inner, forward)


class SafetyHandle:
    """What `attach` returns: the last terms, the weight, and the way back."""

    def __init__(self, inner: nn.Module, forward: _SafetyForward) -> None:
        self._inner = inner
        self._forward = forward
        self._previous = vars(inner).get("forward")  # set by somebody before us, or None
        inner.forward = forward

    @property
    def last(self) -> SafetyLoss | None:
        """The detached terms of the last training step; None before the first."""
        return self._forward.last

    @property
    def weight(self) -> float | Tensor:
        """The penalty's weight; setting it takes effect at the next step."""
        return self._forward.penalty.weight

    @weight.setter
    def weight(self, weight: float | Tensor) -> None:
        self._forward.penalty = dataclasses.replace(self._forward.penalty, weight=weight)

    def remove(self) -> None:
        """Put the model's own forward back. A second call does nothing."""
        self._forward.active = False  # for those who wrapped it meanwhile, as accelerate does
        if vars(self._inner).get("forward") is not self._forward:
            return
        if self._previous is None:
            del self._inner.forward
        else:
            self._inner.forward = self._previous

    def __enter__(self) -> SafetyHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


class _SafetyForward:
    """Stands in for a model's forward. An object and not a closure, so that deepcopy copies it."""

    def __init__(
        self,
        inner: nn.Module,
        head: Head,
        reference: AdaptersOff | FrozenModel,
        safety_tokens: SafetyTokens,
        penalty: SafetyPenalty,
        positions: Positions,
        chunk_bytes: int | None,
        backend: str,
    ) -> None:
        self.inner = inner
        self.original = inner.forward
        self.signature = inspect.signature(self.original)
        self.head = head
        self.reference = reference
        self.safety_tokens = safety_tokens
        self.penalty = penalty
        self.positions = positions
        self.chunk_bytes = chunk_bytes
        self.backend = backend
        self.active = True
        self.last: SafetyLoss | None = None
        # Trainer reads the signature to choose columns and to see whether **kwargs are taken.
        functools.update_wrapper(self, self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the safety loss where there is one to compute; else call the model's forward."""
        names = list(self.signature.parameters)
        batch = {**dict(zip(names, args, strict=False)), **kwargs}
        labels = batch.get("labels")
        shift_labels = batch.get("shift_labels")
        if not (self.active and self.inner.training) or (labels is None and shift_labels is None):
            return self.original(*args, **kwargs)
        num_items = batch.get("num_items_in_batch")
        for name in _LOSS_ARGUMENTS:
            batch.pop(name, None)
        # labels may be elsewhere, with a model spread over devices; the loss is made at the head
        target = _shift(labels) if shift_labels is None else shift_labels
        target = target.to(self.head.module.weight.device)
        as_tuple = batch.pop("return_dict", None) is False
        _check_logits_to_keep(batch)

        safety_ids = self.safety_tokens.ids_on(target.device)
        # no ids: plain cross-entropy, and the pass of the reference is spared
        ref = self._reference(safety_ids, batch) if len(self.safety_tokens) else None
        with capture_hidden(self.head.module) as captured:
            output = self.original(**batch, return_dict=True)
        hidden = captured.take().to(target.device)  # (B, T, D)
        if hidden.shape[:2] != target.shape:
            raise ValueError(
                f"`labels` must have shape {tuple(hidden.shape[:2])}, one per position; "
                f"got {tuple(target.shape)}"
            )
        if num_items is None:
            num_items = (target != IGNORE_INDEX).sum()
        terms = safety_linear_cross_entropy(
            hidden.flatten(0, 1),
            self.head.module.weight,
            target.flatten(),
            None if ref is None else safety_ids,
            ref,
            linear_bias=self.head.module.bias,
            penalty=self.penalty,
            safety_row_weight=self._row_weight(target, batch.get("attention_mask")),
            num_items=num_items,
            num_safety_items=num_items,
            logit_scale=self.head.logit_scale,
            softcap=self.head.softcap,
            chunk_bytes=self.chunk_bytes,
            backend=self.backend,
        )
        self.last = terms.detach()
        # Made anew, since a field that was None would otherwise come last in a tuple. The logits
        # are of one position only: better absent than mistaken for the batch's.
        fields = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
        loss = terms.loss + _auxiliary_loss(self.inner, output)
        output = type(output)(**{**fields, "loss": loss, "logits": None})
        return output.to_tuple() if as_tuple else output

    def _reference(self, safety_ids: Tensor, batch: dict[str, Any]) -> Tensor:  # (B * T, K)
        """Return what the penalty compares with: logits, or for its kind log-probabilities."""
        if self.penalty.kind not in ON_LOG_PROBS:
            return self.reference(safety_ids, batch, project)
        measure = functools.partial(
            safety_log_probs, chunk_bytes=self.chunk_bytes, backend=self.backend
        )
        return self.reference(safety_ids, batch, measure)

    def _row_weight(self, target: Tensor, attention_mask: Any) -> Tensor | None:  # (B * T,)
        """Return w: None for every label, or a mask of the positions asked for."""
        if self.positions == "response":
            return None
        if self.positions == "all":
            inside = torch.ones_like(target, dtype=torch.bool)
            if isinstance(attention_mask, Tensor) and attention_mask.shape == target.shape:
                inside = attention_mask.to(target.device).bool()
            follows = nn.functional.pad(inside[:, 1:], (0, 1), value=False)
            return (inside & follows).flatten().float()
        kept = target != IGNORE_INDEX
        count = kept.cumsum(dim=1)
        # labels counted before the present run of labels: each response starts again at 1
        before = torch.where(kept, 0, count).cummax(dim=1).values
        return (kept & (count - before <= self.positions)).flatten().float()


def _shift(labels: Any) -> Tensor:  # (B, T)
    """Position t predicts label t + 1; the last one predicts nothing."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def _auxiliary_loss(model: nn.Module, output: Any) -> Tensor | float:
    """Return what a mixture-of-experts model adds to its loss by itself."""
    auxiliary = getattr(output, "aux_loss", None)
    coefficient = getattr(model, "router_aux_loss_coef", None)
    if not isinstance(auxiliary, Tensor) or coefficient is None:
        return 0.0
    return auxiliary * float(coefficient)


def _check_vocabulary(name: str, head: Head, safety_tokens: SafetyTokens) -> None:
    largest = int(safety_tokens.ids.max()) if len(safety_tokens) else -1
    if largest >= head.vocab_size:
        raise ValueError(
            f"`safety_tokens` must lie inside the vocabulary of `{name}`, {head.vocab_size} "
            f"tokens; got id {largest}"
        )


def _check_positions(positions: object) -> None:
    number = isinstance(positions, int) and not isinstance(positions, bool) and positions >= 1
    if not number and positions not in ("response", "all"):
        raise ValueError(f"`positions` must be 'response', 'all' or an int >= 1; got {positions!r}")


def _check_logits_to_keep(batch: dict[str, Any]) -> None:
    keep = batch.get("logits_to_keep")
    if keep is not None and not (isinstance(keep, int) and keep == 0):
        raise ValueError("`logits_to_keep` must be 0 when labels are given to an attached model")
