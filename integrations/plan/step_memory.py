"""The memory of a training step in parts: the model's forward, the loss, the backward."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ...op import row_bytes, rows_per_chunk, safety_linear_cross_entropy
from ..models import adapters_off, base_of, evaluation_mode, find_head
from .losses import chunked_loss, loss_by_hand
from .memory_ledger import MemoryLedger, counting

_SCRATCH = 2 << 20  # approximate scratch memory of the PyTorch row step on a CPU


class Loss(NamedTuple):
    """The memory of one way to compute the loss, bytes.

    Attributes:
        peak: above the activations, from the loss's forward to the hidden states' gradient.
        left: kept between its forward and its backward.
        held: by reference logits, from before the forward to the end of the step.
    """

    peak: int
    left: int
    held: int


class StepMemory(NamedTuple):
    """The parts of a training step at one length, bytes above weights and optimizer.

    Attributes:
        forward: peak of the model's forward up to its head.
        activations: kept by the forward for the backward.
        backward: peak of the backward from the head down, including the weights' gradients.
        backward_again: the same if those gradients exist already, and are added to.
        gradients: of the trained weights.
        reference: peak of the reference's forward, without gradient.
        reference_by_hand: the same if it returns all logits, in float32.
        own: the model's own loss.
        by_hand: STR computed from all logits of both models.
        chunked: STR in a PyTorch loop over chunks.
        ours: STR by str_kernels, with reference logits.
        ours_plain: the same without a penalty on the rows.
    """

    forward: int
    activations: int
    backward: int
    backward_again: int
    gradients: int
    reference: int
    reference_by_hand: int
    own: Loss
    by_hand: Loss
    chunked: Loss
    ours: Loss
    ours_plain: Loss


def meta_model(config: Any, dtype: torch.dtype, attention: str, rank: int | None) -> Any:
    """Build a model on the meta device, with LoRA on all linear layers but the head, or without.

    Args:
        config: a transformers config.
        dtype: of the weights.
        attention: "eager", "sdpa", or "auto".
        rank: of the adapters; None trains every weight.

    Returns:
        The model on the meta device, or a PeftModel around it.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config),
            dtype=dtype,
            attn_implementation=None if attention == "auto" else attention,
            trust_remote_code=False,
        )
        model.config.use_cache = False  # as Trainer sets it
        if rank is not None:
            lora = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
            model = get_peft_model(model, lora)
    return model


def checkpoint_layers(model: nn.Module) -> None:
    """Switch gradient checkpointing on, as Trainer does."""
    inner = base_of(model)
    enable: Any = getattr(inner, "activation_checkpointing_enable", None)
    enable = enable or inner.gradient_checkpointing_enable  # its name before 5.20
    enable({"use_reentrant": False})


def measure_step(
    model: Any, rows: int, tokens: int, ids: int, *, padding: bool, device: str
) -> StepMemory:
    """Run a training step of a model from `meta_model` on fake tensors and count its memory.

    Args:
        model: from `meta_model`.
        rows: number of rows in the batch.
        tokens: number of tokens in each row.
        ids: K, the number of safety tokens.
        padding: whether rows differ in length, which needs a mask.
        device: "cpu" or "cuda", on which the loss's chunk size depends.

    Returns:
        The memory of each part.

    Raises:
        ValueError: the model has no head.
    """
    model.train()
    head = find_head(base_of(model))
    if head is None:
        raise ValueError("`model` must have output embeddings; got none")
    with counting(model) as ledger:
        batch = {"input_ids": torch.zeros((rows, tokens), dtype=torch.int64)}
        if padding:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        reference, states = _reference(model, head, batch, ledger)
        own = _own_step(model, head, batch, ledger)
        losses = _Losses(head, own.hidden, rows, ids, device, ledger)
        return StepMemory(
            forward=own.forward,
            activations=own.activations,
            backward=own.backward,
            backward_again=own.backward_again,
            gradients=gradient_bytes(model),
            reference=reference,
            reference_by_hand=max(reference, states + losses.full_logits()),
            own=Loss(own.loss, 0, 0),
            by_hand=losses.by_hand(),
            chunked=losses.chunked(),
            ours=losses.ours(with_ids=True),
            ours_plain=losses.ours(with_ids=False),
        )


def gradient_bytes(model: nn.Module) -> int:
    """Return the bytes of all gradients, which have the dtypes of the trained weights."""
    return sum(_size(p) for p in model.parameters() if p.requires_grad)


def optimizer_bytes(model: nn.Module) -> int:
    """Return the bytes of AdamW's two moments, in the parameters' dtypes, and its counters."""
    return sum(2 * _size(p) + 4 for p in model.parameters() if p.requires_grad)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers, tied ones once."""
    return sum(_size(tensor) for tensor in (*model.parameters(), *model.buffers()))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


class _OwnStep(NamedTuple):
    forward: int
    activations: int
    loss: int
    backward: int
    backward_again: int
    hidden: Tensor  # (N, D), as the head sees it


def _own_step(
    model: Any, head: nn.Module, batch: dict[str, Tensor], ledger: MemoryLedger
) -> _OwnStep:
    """Run forward and backward with the model's own loss."""
    before = ledger.live
    seen: dict[str, Any] = {}

    def at_head(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen["forward"] = ledger.restart() - before
        seen["activations"] = ledger.live - before
        seen["like"] = (args[0].numel() // args[0].shape[-1], args[0].shape[-1]), args[0].dtype
        args[0].register_hook(at_gradient)

    def at_gradient(_: Tensor) -> None:
        seen["loss"] = ledger.restart() - before - seen["activations"]

    ledger.restart()
    with head.register_forward_pre_hook(at_head):
        loss = model(**batch, labels=batch["input_ids"]).loss
    with _setting_gradients_apart(model, ledger):
        loss.backward()
        of_rest = ledger.peak_of_rest - before
        backward = ledger.restart() - before
    model.zero_grad()
    shape, dtype = seen["like"]
    hidden = torch.empty(shape, dtype=dtype, requires_grad=True)
    again = of_rest + gradient_bytes(model)
    return _OwnStep(seen["forward"], seen["activations"], seen["loss"], backward, again, hidden)


@contextlib.contextmanager
def _setting_gradients_apart(model: nn.Module, ledger: MemoryLedger) -> Iterator[None]:
    """Exclude complete gradients from the ledger's `peak_of_rest`."""

    def complete(parameter: Tensor) -> None:
        ledger.apart += _size(parameter)

    with contextlib.ExitStack() as hooks:
        for parameter in model.parameters():
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(complete)
                hooks.callback(hook.remove)
        yield
    ledger.apart = 0


def _reference(
    model: Any, head: nn.Module, batch: dict[str, Tensor], ledger: MemoryLedger
) -> tuple[int, int]:
    """Run the reference's forward; return its peak, and the live bytes when it reaches the head."""
    inner = base_of(model)
    before = ledger.live
    states: list[int] = []

    def at_head(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        states.append(ledger.live - before)
        return (args[0][:, :1], *args[1:])

    ledger.restart()
    off = adapters_off(model) if inner is not model else contextlib.nullcontext()
    with torch.no_grad(), evaluation_mode(inner), off, head.register_forward_pre_hook(at_head):
        inner(**batch)
    return ledger.restart() - before, states[-1]


class _Losses:
    """Measures each way to compute the loss from hidden states."""

    def __init__(
        self,
        head: Any,
        hidden: Tensor,  # (N, D)
        rows: int,
        ids: int,
        device: str,
        ledger: MemoryLedger,
    ) -> None:
        self._head = head
        self._hidden = hidden
        self._rows = rows
        self._ledger = ledger
        weight: Tensor = self._head.weight
        self._vocab = weight.shape[0]
        self._target = torch.zeros(hidden.shape[0], dtype=torch.int64)
        self._ids = torch.zeros(ids, dtype=torch.int64)
        self._ref = torch.zeros((hidden.shape[0], ids))
        with torch.device(device if device == "cpu" or torch.cuda.is_available() else "meta"):
            placed = torch.empty(hidden.shape, dtype=hidden.dtype)
        self._chunk = min(
            rows_per_chunk(placed, self._vocab, None, weight.requires_grad), max(1, hidden.shape[0])
        )
        self._workspace = self._chunk * row_bytes(hidden, self._vocab)
        if device == "cpu" and hidden.itemsize < 4:  # otherwise it works in place
            self._workspace += min(_SCRATCH, self._chunk * self._vocab * 4)

    def full_logits(self) -> int:
        """Return the bytes of all logits, as the model returns them and in float32."""
        return self._hidden.shape[0] * self._vocab * (self._hidden.itemsize + 4)

    def by_hand(self) -> Loss:
        batched = (self._rows, -1)
        ref = torch.zeros((self._hidden.shape[0], self._vocab)).unflatten(0, batched)

        def make() -> Tensor:
            logits = self._head(self._hidden).unflatten(0, batched)
            return loss_by_hand(logits, self._target.unflatten(0, batched), self._ids, ref)

        return self._count(make, held=_size(ref))

    def chunked(self) -> Loss:
        def make() -> Tensor:
            return chunked_loss(
                self._hidden, self._head, self._target, self._ids, self._ref, self._chunk
            )

        return self._count(make, held=_size(self._ref))

    def ours(self, *, with_ids: bool) -> Loss:
        def make() -> Tensor:
            return safety_linear_cross_entropy(
                self._hidden,
                self._head.weight,
                self._target,
                self._ids if with_ids else None,
                self._ref if with_ids else None,
                linear_bias=self._head.bias,
            ).loss

        found = self._count(make, held=_size(self._ref) if with_ids else 0)
        # not seen inside the op: a chunk of logits, and the student's logits of the ids
        inside = self._workspace + (_size(self._ref) if with_ids else 0)
        return found._replace(peak=max(found.peak, found.left + inside))

    def _count(self, make: Callable[[], Tensor], held: int) -> Loss:
        before = self._ledger.live
        self._ledger.restart()
        loss = make()
        left = self._ledger.live - before
        loss.backward()
        peak = self._ledger.restart() - before
        self._hidden.grad = None
        self._head.zero_grad()
        return Loss(peak, left, held)
