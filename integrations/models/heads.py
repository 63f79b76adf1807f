"""The head of a causal LM: its weights, with or without an adapter.

`safety_linear_cross_entropy` needs the operands of z = cap(scale * (h W^T + b + t B^T)), not the
module. `ModelHead.operands` reads them from a plain nn.Linear or from PEFT's wrapper of one: a
LoRA or DoRA layer (whose own `.weight` is only the base weight), or a trained copy
(modules_to_save). They are read at each use, since switching adapters off changes them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .sharded_weights import check_group, group_of, rows_of

# PEFT's layer on an nn.Linear, by name, so that peft need not be installed. Its subclasses compute
# something else.
_LORA_LINEAR = ("peft.tuners.lora.layer", "Linear")
_NORM_ROWS = 4096  # rows of the head at a time, for DoRA's norms


class Operands(NamedTuple):
    """The linear_weight, linear_bias and low_rank of `safety_linear_cross_entropy`."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    low_rank: tuple[Tensor, Tensor] | None  # (N, r), (V, r)

    @property
    def extras(self) -> dict[str, Any]:
        """Return the two optional ones as keywords of the functions."""
        return {"linear_bias": self.bias, "low_rank": self.low_rank}


@dataclass(frozen=True)
class ModelHead:
    """A language-model head: z = cap(logit_scale * (hidden W^T + b + t B^T)).

    Attributes:
        module: an nn.Linear, or PEFT's layer around one.
        logit_scale: factor on its output.
        softcap: cap in logits, or None.
        group: the ranks that tensor parallelism splits its rows over, "" for none.
    """

    module: nn.Module
    logit_scale: float = 1.0
    softcap: float | None = None
    group: str = ""

    @property
    def vocab_size(self) -> int:
        """Return V, the rows of the weight (config.vocab_size may differ after a resize)."""
        return rows_of(_linear_in(self.module).weight)

    @property
    def device(self) -> torch.device:
        """Return the device of the weight, where the loss is computed."""
        device: torch.device = _linear_in(self.module).weight.device
        return device

    def operands(self, hidden: Tensor) -> Operands:
        """Return the operands for the adapters that are on now, with fresh dropout.

        Args:
            hidden: (N, D), the head's input; an adapter's first matrix is applied to it.
        """
        layer = _copy_in_use(self.module)
        check_group(_linear_in(self.module).weight, self.group)
        if not _is_lora(layer):
            return Operands(layer.weight, layer.bias, None)
        return _lora_operands(layer, hidden)


def head_at(module: nn.Module) -> ModelHead:
    """Return a head with the ranks it is split over; scale and cap are still the defaults."""
    return ModelHead(module, group=group_of(_linear_in(module).weight))


def find_head(model: nn.Module) -> nn.Module | None:
    """Return the output embeddings of a Hugging Face model, or None if it has none."""
    find = getattr(model, "get_output_embeddings", None)
    try:
        head = find() if callable(find) else None
    except (AttributeError, NotImplementedError):  # some classes have the method and no head
        return None
    return head if isinstance(head, nn.Module) else None


@contextlib.contextmanager
def contiguous_head_input(model: nn.Module) -> Iterator[None]:
    """Make the head's input contiguous, which it is not in the first step of generate().

    For a strided (B, 1, D) on a CPU, torch's linear copies the whole head for every row; 16 rows
    and a head of 28 M elements in bfloat16 took 4.80 s instead of 0.03 s (docs/log.md).
    """
    head = find_head(model)
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def reason_against(head: nn.Module | None, model: nn.Module) -> str | None:
    """Say why a head's operands cannot be read, or return None if they can."""
    if head is None:
        return f"have output embeddings; {type(model).__name__} has none"
    copies = getattr(head, "modules_to_save", None)
    layers = [head] if copies is None else [head.original_module, *copies.values()]
    for layer in layers:
        reason = _reason_against_layer(layer)
        if reason:
            return reason
    return None


def _reason_against_layer(layer: Any) -> str | None:
    """Say why a layer's operands cannot be read; checked again at each step."""
    name = f"{type(layer).__module__}.{type(layer).__name__}"
    linear = layer
    if (type(layer).__module__, type(layer).__name__) == _LORA_LINEAR:
        linear = layer.get_base_layer()
        if layer.merged:
            return "have no merged adapter on its head (call unmerge_adapter()); got one"
        if any(rows_of(b.weight) != rows_of(linear.weight) for b in layer.lora_B.values()):
            return (
                "have no LoRA on a head that is tensor parallel, which PEFT gives the rows of one "
                "rank; got one"
            )
        for adapter, variant in layer.lora_variant.items():
            if adapter not in layer.lora_magnitude_vector:
                return f"have a plain LoRA or DoRA on its head; got {type(variant).__name__}"
            if adapter in layer.active_adapters[1:]:
                return "have no DoRA on its head that scales what another adapter added; got one"
            if not isinstance(layer.lora_dropout[adapter], nn.Identity):
                return (
                    "have lora_dropout 0 with DoRA on its head, where the dropout is applied to "
                    "the frozen weight's product too; got some"
                )
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        return f"have a plain nn.Linear as its head, or a LoRA or DoRA on one; got {name}"
    if linear.weight.is_meta:
        return "have its head's weight in memory while it trains; got one that is offloaded"
    return None


def _copy_in_use(module: Any) -> Any:
    """Return the layer in use: the original, or PEFT's trained copy of it (modules_to_save)."""
    copies = getattr(module, "modules_to_save", None)
    if copies is None:
        return module
    active = module.active_adapters
    if module.disable_adapters or not active or any(name not in copies for name in active):
        return module.original_module
    return copies[active[0]]


def _is_lora(layer: nn.Module) -> bool:
    return hasattr(layer, "lora_A")


def _linear_in(module: nn.Module) -> Any:
    layer = _copy_in_use(module)
    return layer.get_base_layer() if _is_lora(layer) else layer


def _lora_operands(layer: Any, hidden: Tensor) -> Operands:
    """Read W, b, t and B from a LoRA or DoRA layer.

    LoRA adds s B A h, so t = s A(dropout(h)). DoRA, which must be the first adapter, multiplies row
    v of W + s B A by m_v = magnitude_v / ||W_v + s (B A)_v||, where the norm has no gradient:

        z = m (W h) + b + m s B A h + sum s_i B_i A_i h,    m = 1 without DoRA

    So only DoRA needs a scaled copy of W.
    """
    base = layer.get_base_layer()
    weight, bias = base.weight, base.bias
    factor: Tensor | None = None  # (V, 1)
    ts: list[Tensor] = []
    bs: list[Tensor] = []
    for name in [] if layer.disable_adapters else layer.active_adapters:
        if name not in layer.lora_A:
            continue
        a, b, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        t = a(layer.lora_dropout[name](hidden.to(a.weight.dtype))) * scaling
        second, added = b.weight, b.bias  # LoraConfig(lora_bias=True) gives B a bias
        if name in layer.lora_magnitude_vector:
            norm = _row_norms(base.weight, a.weight, second, scaling)
            magnitude = (layer.lora_magnitude_vector[name].weight / norm).unsqueeze(1)
            factor = magnitude
            second = magnitude * second
            added = None if added is None else magnitude.squeeze(1) * added
        if added is not None:
            added = (added * scaling).to(hidden.dtype)
            bias = added if bias is None else bias + added
        ts.append(t.to(hidden.dtype))
        bs.append(second.to(hidden.dtype))
    if factor is not None:
        weight = (weight.to(factor.dtype) * factor).to(hidden.dtype)
    return Operands(weight, bias, (torch.cat(ts, dim=1), torch.cat(bs, dim=1)) if ts else None)


@torch.no_grad()
def _row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:  # (V,)
    """Return ||W_v + s (B A)_v||, a block of rows at a time since B A is as large as W."""
    blocks = zip(weight.split(_NORM_ROWS), b.split(_NORM_ROWS), strict=True)
    return torch.cat(
        [torch.linalg.norm(w.to(a.dtype) + scaling * (rows @ a), dim=1) for w, rows in blocks]
    )


class Tap:
    """Context manager that captures the hidden states given to the head.

    The head gets one position only, so that the model makes (B, 1, V) logits. The hook stays on the
    head from `open` to `close`, also while nothing is captured, since torch.compile traces hooks
    once and does not check whether they have changed.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._hook: Any = None
        self._armed = False
        self._hidden: Tensor | None = None  # (B, T, D)

    def open(self) -> None:
        """Put the hook on the head."""
        if self._hook is None:
            self._hook = self._module.register_forward_pre_hook(self._catch)

    def close(self) -> None:
        """Remove the hook. A second call does nothing."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def take(self) -> Tensor:
        """Return the hidden states of the last forward, and drop them here."""
        hidden, self._hidden = self._hidden, None
        if hidden is None:
            raise RuntimeError("the model's forward did not call its output embeddings")
        return hidden

    def __enter__(self) -> Tap:
        self._armed, self._hidden = True, None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._armed = False
        if kind is not None:
            self._hidden = None

    def _catch(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self._armed:
            return None
        if self._hidden is not None:
            raise RuntimeError("the model's forward called its output embeddings more than once")
        self._hidden = args[0]
        # contiguous: on a strided (B, 1, D) the CPU's linear copies the whole head for every row
        return (args[0][:, :1].contiguous(), *args[1:])
