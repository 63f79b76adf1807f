"""attach(): train a Hugging Face causal LM with the safety loss, and change nothing else."""

from __future__ import annotations

import warnings
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...op import SafetyLoss, SafetyPenalty
from ...tokens import SafetyTokens
from ..anchors import AnchorPass, AnchorPrompts
from ..models import (
    AdaptersAtStart,
    AdaptersOff,
    FrozenModel,
    LossPath,
    PathName,
    Positions,
    PromptOff,
    Reference,
    ReferenceFunction,
    Shortened,
    base_of,
    check_adapters,
    check_not_sharded,
    check_own_forward,
    check_start,
    check_student,
    has_adapters,
    is_prompt_learning,
    make_path,
    read_safety_logits,
)
from ..reference_cache import given_reference
from .forward import FusedOutput, SafetyForward
from .settings import AttachOptions


def attach(
    model: nn.Module,
    safety_tokens: SafetyTokens,
    *,
    penalty: SafetyPenalty | None = None,
    ref_model: nn.Module | None = None,
    reference: ReferenceFunction | Literal["start"] | None = None,
    positions: Positions = "none",
    anchors: AnchorPrompts | Literal["default"] | None = None,
    tokenizer: Any = None,
    ref_every: int = 1,
    ref_tokens: int | None = None,
    path: PathName = "linear",
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> SafetyHandle:
    """Make `model(..., labels=...)` return the safety loss while training.

    The penalty is taken at anchors by default. Anchors are prompts without answers; a few of them
    go through the model in each step, in a short pass of their own, and the frozen reference reads
    each of them once. In training mode with labels, the model's forward then computes

        loss = ce / num_items + weight * mean penalty at the anchors   (+ its own auxiliary loss)

    from the hidden states, a chunk of rows at a time. The training rows have no penalty and need no
    reference pass. With `positions="response"`, the paper's form, the penalty is taken on the rows:

        loss = (ce + weight * penalty) / num_items

    and each batch takes one more pass, without gradient, for the reference's logits. num_items is
    `num_items_in_batch` if the caller passes it (Trainer does), and otherwise the number of labels
    in the batch; so gradient accumulation equals one large batch. Without labels, in eval mode and
    in generate() the model is unchanged.

    Args:
        model: a Hugging Face causal LM, or a PeftModel around one. Attach it before you wrap it
            in DDP, FSDP or torch.compile.
        safety_tokens: the tokens whose logits the penalty compares, of the model's vocabulary.
        penalty: kind and weight. None means weight 0.1 and, with anchors alone, "coarse_kl"; with
            a penalty on rows, the paper's "mse". If its id_weights are None, those of
            `safety_tokens` are used.
        ref_model: the frozen aligned model, on any device. None uses `model` with its adapters
            off, which costs no memory and needs adapters on frozen base weights.
        reference: used instead of a model: a function that takes the safety ids (K,) and the batch
            without labels, and returns the frozen model's logits of these ids, (B, T, K), or
            log-probabilities for penalty kinds "logprob" and "coarse_kl". Or "start", for adapters
            that were trained before: the model with its adapters as they are now, of which a copy
            is kept as a second adapter.
        positions: where the penalty is taken on the training rows: "none", "response" (every label,
            the paper's form), "all" (every position whose next token is not padding) or the first m
            labels of each response.
        anchors: prompts without answers, at a few of which the penalty is taken in each step;
            see AnchorPrompts. "default" is the 132 prompts of the package, 2 harmful and 2
            harmless ones per step; None means the same with `positions="none"`.
        tokenizer: the model's, with a chat template; needed only for the default anchors.
        ref_every: take the penalty on rows, and run the reference, only in every n-th training
            forward (a micro-step), and count it n times there. Anchors are in every forward.
        ref_tokens: the reference reads only this many tokens at the start of each row, and the
            penalty is taken only there. For rows padded on the right and not packed: later rows of
            a pack would get no penalty. That is an error where `cu_seq_lens_*`, or `position_ids`
            on a CPU, show the packing.
        path: "linear" reads the head's weight and never makes the full logits. "logits" uses the
            model's own logits and keeps them all in memory, for heads that cannot be read
            (quantised, or with an adapter other than LoRA or DoRA). docs/support.md says which
            model needs which.
        chunk_bytes: memory for one chunk's logits, bytes; None picks a size for the device.
        backend: as in `safety_linear_cross_entropy`.

    Returns:
        A handle, which is also a context manager: `.last` has the terms of the last step, `.weight`
        can be set between steps, `.remove()` restores the model.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the loss would not be exact on this model; the message says why and what to use.

    Notes:
        On the linear path the output's `logits` are None in training, since they are never made.
        In 16 bits the logits path sees drifts no smaller than a step of the logits, 0.125 at 20.
        A cache with labels is refused, since its keys are not the reference's. Each step checks
        that the reference is still frozen.
        nn.DataParallel, which Trainer falls back to with several GPUs and no launcher, does not
        work: use torchrun. torch.compile compiles the model's layers; the loss stays a separate op.

    References:
        Bach and Tran 2026, arXiv:2604.17210.

    Examples:
        >>> handle = attach(model, SafetyTokens.from_templates(tokenizer))  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> handle.remove()  # doctest: +SKIP
    """
    if not isinstance(safety_tokens, SafetyTokens):
        raise TypeError(f"`safety_tokens` must be SafetyTokens; got {type(safety_tokens).__name__}")
    options = AttachOptions(
        penalty=penalty,
        ref_model=ref_model,
        reference=reference,
        positions=positions,
        anchors=anchors,
        tokenizer=tokenizer,
        ref_every=ref_every,
        ref_tokens=ref_tokens,
        path=path,
        chunk_bytes=chunk_bytes,
        backend=backend,
    )
    return _attach(model, safety_tokens, options)


def _attach(model: nn.Module, safety_tokens: SafetyTokens, options: AttachOptions) -> SafetyHandle:
    """Check the model, make its reference, and put the safety loss into its forward."""
    penalty = options.penalty_of(safety_tokens)
    if is_prompt_learning(model):
        if options.ref_tokens is not None:
            raise ValueError(
                f"`ref_tokens` must be None for prompt learning; got {options.ref_tokens}"
            )
        if options.anchors is not None or options.positions == "none":
            raise ValueError(
                "`anchors` must be None and `positions` not 'none' for prompt learning: anchors "
                "would reach the model without its virtual tokens. Pass positions='response'"
            )
    anchors = options.held_anchors()
    inner = base_of(model)
    if isinstance(vars(inner).get("forward"), SafetyForward):
        raise ValueError(
            "`model` must not be attached twice; call remove() on the first handle. (A deepcopy of "
            "an attached model is attached, for good: copy it before.)"
        )
    check_student(model)
    check_not_sharded("model", model)
    check_own_forward(inner)
    _check_reference(model, options)
    student = make_path(inner, options.path, options.chunk_bytes, options.backend)
    _check_vocabulary("model", student.vocab_size, safety_tokens)
    frozen = _reference(model, inner, student, safety_tokens, penalty, options)
    if isinstance(frozen, (AdaptersOff, FrozenModel)):
        _warn_if_moved(inner, frozen, student)
    of_rows = frozen if options.ref_tokens is None else Shortened(frozen, options.ref_tokens)
    forward = SafetyForward(inner, student, of_rows, safety_tokens, penalty, options)
    if anchors is not None:
        forward.anchor_pass = AnchorPass(anchors, inner, student, frozen)
    return SafetyHandle(model, inner, forward)


def _check_reference(model: nn.Module, options: AttachOptions) -> None:
    """Check that the model's adapters allow the kind of reference that the options name."""
    if options.reference == "start":
        check_start(model)
    elif options.reference is None and options.ref_model is None and has_adapters(model):
        check_adapters(model)
    elif is_prompt_learning(model):
        raise ValueError(
            "`ref_model` and `reference` must be None for prompt learning: they would be given the "
            "virtual tokens too. Without them the reference is the model without the tokens."
        )


def _reference(
    model: nn.Module,
    inner: nn.Module,
    student: LossPath,
    safety_tokens: SafetyTokens,
    penalty: SafetyPenalty,
    options: AttachOptions,
) -> Reference:
    """Return the reference that the model is compared with."""
    if options.reference == "start":
        return AdaptersAtStart(model, inner, inner.forward, student)
    if options.reference is not None:
        return given_reference(options.reference, model, safety_tokens, penalty.kind)
    if options.ref_model is not None:
        return _second_model(inner, options.ref_model, safety_tokens, options)
    if has_adapters(model):
        off = PromptOff if is_prompt_learning(model) else AdaptersOff
        return off(model, inner, inner.forward, student)
    raise ValueError(
        "`ref_model` must be given for a model without adapters: the frozen aligned model to "
        "compare with (a copy made before training); got None"
    )


def _second_model(
    inner: nn.Module, ref_model: nn.Module, safety_tokens: SafetyTokens, options: AttachOptions
) -> FrozenModel:
    """Check a second, frozen model and return it as the reference."""
    ref_inner = base_of(ref_model)
    if ref_inner is inner:
        raise ValueError("`ref_model` must be another model than `model`; got the same one")
    if is_prompt_learning(ref_model):
        raise ValueError(
            "`ref_model` must not have virtual tokens in front of its input; got a PeftModel with "
            "prompt learning. Pass a function that calls it as `reference`."
        )
    check_not_sharded("ref_model", ref_model)
    ref_path = make_path(ref_inner, options.path, options.chunk_bytes, options.backend)
    _check_vocabulary("ref_model", ref_path.vocab_size, safety_tokens)
    return FrozenModel(ref_inner, ref_path, inner)


class SafetyHandle:
    """Returned by `attach`: reads the last terms, sets the weight, removes the loss."""

    def __init__(self, model: nn.Module, inner: nn.Module, forward: SafetyForward) -> None:
        self._inner = inner
        self._forward = forward
        self._previous = vars(inner).get("forward")  # set by other code before, or None
        inner.forward = forward
        # on the PeftModel, since up to PEFT 0.19 it calls inner.forward and so no hook of inner
        self._watch = model.register_forward_hook(forward.check_reached, with_kwargs=True)
        forward.path.open()
        forward.reference.open()
        if forward.anchor_pass is not None:
            forward.anchor_pass.open()
        forward.gradients.open()

    @property
    def last(self) -> SafetyLoss | None:
        """The detached terms of the last training forward; None before the first.

        With gradient accumulation they are those of one micro-step. Anchors are not included.
        """
        return self._forward.last

    @property
    def weight(self) -> float | Tensor:
        """The penalty's weight; setting it takes effect at the next step."""
        return self._forward.penalty.weight

    @weight.setter
    def weight(self, weight: float | Tensor) -> None:
        self._forward.penalty = self._forward.penalty.with_weight(weight)

    @property
    def last_anchors(self) -> SafetyLoss | None:
        """The detached terms of the anchors in that forward, times its share of the labels."""
        return None if self._forward.anchor_pass is None else self._forward.anchor_pass.last

    @property
    def step(self) -> int:
        """The optimizer step, which determines the anchors of a forward.

        It is counted automatically: the first forward after an optimizer's step, or after a write
        to the trained weights, begins the next one. Once you set it, as SafetyTrainer does so that
        resumed runs get the same anchors, it changes only when you set it again.
        """
        return 0 if self._forward.anchor_pass is None else self._forward.anchor_pass.step

    @step.setter
    def step(self, step: int) -> None:
        if self._forward.anchor_pass is not None:
            self._forward.anchor_pass.set_step(step)

    def for_trl(self, output: FusedOutput, num_items: Any) -> None:
        """Answer TRL's fused_lm_head calls with `output`; use this divisor in the next forward."""
        self._forward.fused_output = output
        self._forward.num_items = num_items

    def remove(self) -> None:
        """Restore the model's own forward. A second call does nothing."""
        self._watch.remove()
        self._forward.active = False  # other code may have wrapped it since, as accelerate does
        self._forward.path.close()
        self._forward.reference.close()
        if self._forward.anchor_pass is not None:
            self._forward.anchor_pass.close()
        self._forward.gradients.close()
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


def _check_vocabulary(name: str, vocab_size: int, safety_tokens: SafetyTokens) -> None:
    largest = int(safety_tokens.ids.max()) if len(safety_tokens) else -1
    if largest >= vocab_size:
        raise ValueError(
            f"`safety_tokens` must lie inside the vocabulary of `{name}`, {vocab_size} "
            f"tokens; got id {largest}"
        )


def _warn_if_moved(inner: nn.Module, frozen: Reference, student: LossPath) -> None:
    """Warn if the model differs from its reference before the first step."""
    device = next(inner.parameters()).device
    batch = {"input_ids": torch.arange(1, 9, device=device).unsqueeze(0)}
    ids = torch.arange(min(8, student.vocab_size), device=student.device or device)
    student.open()
    frozen.open()
    try:
        before = frozen(ids, batch, False)
        now = read_safety_logits(inner, inner.forward, student, ids, batch).to(before.device)
    finally:
        student.close()
        frozen.close()
    size = before.float().abs().max().clamp(min=1.0)
    # a copy of the model may use other kernels, which round differently
    eps = max(1e-5, 4 * torch.finfo(next(inner.parameters()).dtype).eps)
    if bool((now.float() - before.float()).abs().max() > eps * size):
        warnings.warn(
            "`model` differs from its reference already: it is held to what it was without its "
            "adapters (or to `ref_model`), and not to what it is now. For adapters that were "
            "trained before pass reference='start'",
            stacklevel=4,
        )
