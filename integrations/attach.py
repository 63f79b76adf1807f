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
from ..penalties import ON_LOG_PROBS
from ..safety_tokens import SafetyTokens
from .cached_reference import given_reference
from .hf_models import auxiliary_loss, not_compiled, runs_the_model, shift
from .loss_paths import LossPath, PathName, check_path, make_path
from .peft_adapters import (
    base_of,
    check_adapters,
    check_student,
    has_adapters,
    is_prompt_learning,
)
from .references import (
    AdaptersOff,
    FrozenModel,
    PromptOff,
    Reference,
    ReferenceFunction,
)

Positions = Literal["response", "all"] | int
_LOSS_ARGUMENTS = ("labels", "shift_labels", "num_items_in_batch")
_CACHES = ("past_key_values", "cache", "cache_params", "state", "mems")  # as models call it


def attach(
    model: nn.Module,
    safety_tokens: SafetyTokens,
    *,
    penalty: SafetyPenalty | None = None,
    ref_model: nn.Module | None = None,
    reference: ReferenceFunction | None = None,
    positions: Positions = "response",
    path: PathName = "linear",
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
        ref_model: the frozen aligned model, on any device. None takes `model` with its adapters
            off, which costs no memory and needs adapters on frozen base weights.
        reference: instead of a model, a function from the safety ids (K,) and the batch without
            labels to the frozen model's logits on them, (B, T, K); log-probabilities for penalty
            kind "logprob".
        positions: where the penalty is taken: "response" (every label), "all" (every position
            whose next token is not padding) or the first m labels of each response.
        path: "linear" reads the head's weight and never makes the full logits; "logits" takes
            the model's own, for heads that cannot be read (quantised, an adapter other than LoRA
            or DoRA), and keeps them all in memory. docs/support.md says which model needs which.
        chunk_bytes: memory for one chunk's logits, bytes; None picks a size for the device.
        backend: as in `safety_linear_cross_entropy`.

    Returns:
        A handle: `.last` has the terms of the last step, `.weight` can be set between steps,
        `.remove()` puts the model back; also a context manager.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the model cannot be attached to exactly; the message says why and what to use.

    Notes:
        On the linear path the output's `logits` are None in training, since they are never made.
        In 16 bits the logits path sees drifts no smaller than a step of the logits, 0.125 at 20.
        A cache with labels is refused: its keys are not the reference's. That the reference still
        is one is checked in each step.
        nn.DataParallel, which Trainer falls back to with several GPUs and no launcher, does not
        work: use torchrun. Under torch.compile the model's layers are compiled, the loss is an op
        of its own.

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
    check_path(path)
    inner = base_of(model)
    if isinstance(vars(inner).get("forward"), _SafetyForward):
        raise ValueError(
            "`model` must not be attached twice; call remove() on the first handle. (A deepcopy of "
            "an attached model is attached, for good: copy it before.)"
        )
    check_student(model)
    if reference is None and ref_model is None and has_adapters(model):
        check_adapters(model)
    elif is_prompt_learning(model):
        raise ValueError(
            "`ref_model` and `reference` must be None for prompt learning: they would be given the "
            "virtual tokens too. Without them the reference is the model without the tokens."
        )
    student = make_path(inner, path, chunk_bytes, backend)
    _check_vocabulary("model", student.vocab_size, safety_tokens)
    frozen: Reference
    if reference is not None:
        if ref_model is not None or not callable(reference):
            raise ValueError(
                "`reference` must be a function, and given without `ref_model`; got "
                f"{type(reference).__name__}, ref_model {type(ref_model).__name__}"
            )
        frozen = given_reference(reference, model, safety_tokens, penalty.kind)
    elif ref_model is not None:
        frozen = _second_model(inner, ref_model, safety_tokens, path, chunk_bytes, backend)
    elif has_adapters(model):
        off = PromptOff if is_prompt_learning(model) else AdaptersOff
        frozen = off(model, inner, inner.forward, student)
    else:
        raise ValueError(
            "`ref_model` must be given for a model without adapters: the frozen aligned model to "
            "compare with (a copy made before training); got None"
        )
    return SafetyHandle(
        inner, _SafetyForward(inner, student, frozen, safety_tokens, penalty, positions)
    )


def _second_model(
    inner: nn.Module, ref_model: nn.Module, safety_tokens: SafetyTokens, *path: Any
) -> FrozenModel:
    """Look at a frozen second model as the reference."""
    ref_inner = base_of(ref_model)
    if ref_inner is inner:
        raise ValueError("`ref_model` must be another model than `model`; got the same one")
    if is_prompt_learning(ref_model):
        raise ValueError(
            "`ref_model` must not have virtual tokens in front of its input; got a PeftModel with "
            "prompt learning. Pass a function that calls it as `reference`."
        )
    ref_path = make_path(ref_inner, *path)
    _check_vocabulary("ref_model", ref_path.vocab_size, safety_tokens)
    return FrozenModel(ref_inner, ref_path, inner)


class SafetyHandle:
    """What `attach` returns: the last terms, the weight, and the way back."""

    def __init__(self, inner: nn.Module, forward: _SafetyForward) -> None:
        self._inner = inner
        self._forward = forward
        self._previous = vars(inner).get("forward")  # set by somebody before us, or None
        inner.forward = forward
        self._watch = inner.register_forward_hook(forward.check_reached, with_kwargs=True)
        forward.path.open()
        forward.reference.open()

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
        self._watch.remove()
        self._forward.active = False  # for those who wrapped it meanwhile, as accelerate does
        self._forward.path.close()
        self._forward.reference.close()
        if vars(self._inner).get("forward") is not self._forward:
            return
        if self._previous is None:
            del self._inner.forward
        else:
            self._inner.forward = self._previous

    def __enter__(self) -> SafetyHandle:
        if not self._forward.active:
            raise RuntimeError("this handle was removed; call attach() again")
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
        path: LossPath,
        reference: Reference,
        safety_tokens: SafetyTokens,
        penalty: SafetyPenalty,
        positions: Positions,
    ) -> None:
        self.inner = inner
        self.original = inner.forward
        self.signature = inspect.signature(self.original)
        self.path = path
        self.reference = reference
        self.safety_tokens = safety_tokens
        self.penalty = penalty
        self.positions = positions
        self.active = True
        self.reached = False
        self.last: SafetyLoss | None = None
        # Trainer reads the signature to choose columns and to see whether **kwargs are taken.
        functools.update_wrapper(self, self.original)

    @runs_the_model
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the safety loss where there is one to compute; else call the model's forward."""
        self.reached = True
        batch = {**dict(zip(self.signature.parameters, args, strict=False)), **kwargs}
        labelled = batch.get("labels") is not None or batch.get("shift_labels") is not None
        if not (self.active and self.inner.training and labelled):
            return self.original(*args, **kwargs)
        as_tuple = batch.pop("return_dict", None) is False
        target, num_items = self._prepare(batch)
        safety_ids = self.safety_tokens.ids_on(target.device)
        # no ids: plain cross-entropy, and the pass of the reference is spared
        ref = None
        if len(self.safety_tokens):
            ref = self.reference(safety_ids, batch, self.penalty.kind in ON_LOG_PROBS)
        output, states = self.path.run(self.original, {**batch, "return_dict": True})
        output = self._finish(
            output, states, target, num_items, ref, safety_ids, batch.get("attention_mask")
        )
        return output.to_tuple() if as_tuple else output

    @not_compiled
    def check_reached(self, inner: nn.Module, _: Any, batch: dict[str, Any], __: Any) -> None:
        """Raise where somebody put another forward in our place, whose loss has no penalty."""
        reached, self.reached = self.reached, False
        if inner.training and not reached and batch.get("labels") is not None:
            raise RuntimeError(
                "the attached model's forward was replaced (as TRL's SFTTrainer and Liger do), and "
                "this loss has no penalty: attach after that, or switch it off"
            )

    @not_compiled
    def _prepare(self, batch: dict[str, Any]) -> tuple[Tensor, Any]:
        """Take the labels out of the batch; return the target (B, T) and the divisor or None."""
        labels, shift_labels, num_items = (batch.pop(name, None) for name in _LOSS_ARGUMENTS)
        _check_logits_to_keep(batch)
        if not self.reference.has_fewer_positions:  # prefix tuning's tokens arrive as a cache
            _check_no_cache(batch)
        target = shift(labels) if shift_labels is None else shift_labels
        # labels may be elsewhere, with a model spread over devices; the loss is made at the head
        return target.to(self.path.device or target.device), num_items

    @not_compiled
    def _finish(
        self,
        output: Any,
        states: Tensor,  # (B, T, D or V)
        target: Tensor,  # (B, T)
        num_items: Any,
        ref: Tensor | None,  # (B, T, K)
        safety_ids: Tensor,
        attention_mask: Any,
    ) -> Any:
        """Make the loss, keep its terms, and put it into the model's output."""
        if states.shape[:2] != target.shape:
            raise ValueError(
                f"`labels` must have shape {tuple(states.shape[:2])}, one per position; "
                f"got {tuple(target.shape)}"
            )
        if num_items is None:
            num_items = (target != IGNORE_INDEX).sum()
        row_weight = self._row_weight(target, attention_mask)
        if ref is not None:
            fewer = self.reference.has_fewer_positions
            ref, row_weight = _beside(ref, target, row_weight, fewer)
        terms = self.path.loss(
            states,
            target.flatten(),
            None if ref is None else safety_ids,
            None if ref is None else ref.flatten(0, 1),
            penalty=self.penalty,
            safety_row_weight=None if row_weight is None else row_weight.flatten().float(),
            num_items=num_items,
            num_safety_items=num_items,
        )
        self.last = terms.detach()
        # Made anew, since a field that was None would otherwise come last in a tuple. Of one
        # position, the logits are better absent than mistaken for the batch's.
        fields = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
        fields["loss"] = terms.loss + auxiliary_loss(self.inner, output)
        if not self.path.keeps_logits:
            fields["logits"] = None
        return type(output)(**fields)

    def _row_weight(self, target: Tensor, attention_mask: Any) -> Tensor | None:  # (B, T)
        """Return w: None for every label, or a mask of the positions asked for."""
        if self.positions == "response":
            return None
        if self.positions == "all":
            inside = torch.ones_like(target, dtype=torch.bool)
            length = target.shape[1]
            if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
                # the last columns: before them may be those of a cache that prefix tuning fills
                inside = attention_mask[:, -length:].to(target.device).bool()
            follows = nn.functional.pad(inside[:, 1:], (0, 1), value=False)
            return inside & follows
        kept = target != IGNORE_INDEX
        count = kept.cumsum(dim=1)
        # labels counted before the present run of labels: each response starts again at 1
        before = torch.where(kept, 0, count).cummax(dim=1).values
        return kept & (count - before <= self.positions)


def _beside(
    ref: Tensor, target: Tensor, row_weight: Tensor | None, fewer: bool
) -> tuple[Tensor, Tensor | None]:  # (B, T, K), (B, T)
    """Align the reference with the student, whose first positions are virtual tokens if `fewer`.

    The reference has no such positions: nothing is compared there.
    """
    virtual = target.shape[1] - ref.shape[1]
    if ref.shape[0] != target.shape[0] or virtual < 0 or (virtual and not fewer):
        raise ValueError(
            "the reference (`ref_model` or `reference`) must have a position for each of "
            f"{tuple(target.shape)} labels; it has {tuple(ref.shape[:2])}"
        )
    if virtual == 0:
        return ref, row_weight
    weight = target != IGNORE_INDEX if row_weight is None else row_weight
    real = torch.arange(target.shape[1], device=target.device) >= virtual
    return nn.functional.pad(ref, (0, 0, virtual, 0)), weight & real


def _check_vocabulary(name: str, vocab_size: int, safety_tokens: SafetyTokens) -> None:
    largest = int(safety_tokens.ids.max()) if len(safety_tokens) else -1
    if largest >= vocab_size:
        raise ValueError(
            f"`safety_tokens` must lie inside the vocabulary of `{name}`, {vocab_size} "
            f"tokens; got id {largest}"
        )


def _check_positions(positions: object) -> None:
    number = isinstance(positions, int) and not isinstance(positions, bool) and positions >= 1
    if not number and positions not in ("response", "all"):
        raise ValueError(f"`positions` must be 'response', 'all' or an int >= 1; got {positions!r}")


def _check_no_cache(batch: dict[str, Any]) -> None:
    """Refuse a cache with labels: its keys are the student's, and the reference adds its own."""
    for name in _CACHES:
        if batch.get(name) is not None:
            raise ValueError(f"`{name}` must be None when labels are given to an attached model")


def _check_logits_to_keep(batch: dict[str, Any]) -> None:
    keep = batch.get("logits_to_keep")
    if keep is not None and not (isinstance(keep, int) and keep == 0):
        raise ValueError("`logits_to_keep` must be 0 when labels are given to an attached model")
