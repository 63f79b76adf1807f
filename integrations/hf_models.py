"""What is known of a Hugging Face causal LM: its head, and the hidden state the head is given.

Nothing is believed from a config alone. `probe_head` feeds the head a chosen hidden state, looks at
the logits that the model makes of it, and keeps the (scale, softcap) that reproduces them; a model
that none reproduces is refused with the reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..projection import scale_and_cap

# The largest raw logit of the probe. Far above ordinary caps (30), so that a cap shows even in
# bfloat16, and far below where float16 overflows.
_PROBE_LOGIT = 100.0
_PROBE_TOKENS = 8


@dataclass(frozen=True)
class Head:
    """A language-model head: z = cap(logit_scale * (hidden W^T + b)).

    Attributes:
        module: the nn.Linear; its weight is read at each step, never kept.
        logit_scale: factor on its output.
        softcap: cap in logits, or None.
    """

    module: nn.Linear
    logit_scale: float
    softcap: float | None

    @property
    def vocab_size(self) -> int:
        """Return V, the rows of the weight (config.vocab_size may differ after a resize)."""
        return int(self.module.weight.shape[0])


class Captured:
    """Holds the hidden state that a forward handed to its head."""

    hidden: Tensor | None = None  # (B, T, D)

    def take(self) -> Tensor:
        """Return the state and forget it."""
        hidden, self.hidden = self.hidden, None
        if hidden is None:
            raise RuntimeError("the model's forward did not call its output embeddings")
        return hidden


@contextlib.contextmanager
def capture_hidden(head: nn.Module) -> Iterator[Captured]:
    """Catch the head's input and pass on one position, so that the model makes (B, 1, V) logits."""
    captured = Captured()

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        captured.hidden = args[0]
        # contiguous: on a strided (B, 1, D) the CPU's linear copies the whole head for every row
        return (args[0][:, :1].contiguous(), *args[1:])

    handle = head.register_forward_pre_hook(hook)
    try:
        yield captured
    finally:
        handle.remove()


@contextlib.contextmanager
def contiguous_head_input(model: nn.Module) -> Iterator[None]:
    """Let the head see contiguous states, as in generate()'s first step it does not.

    On a CPU torch's linear of a strided (B, 1, D) copies the whole head for every row; 16 rows and
    a head of 28 M elements in bfloat16 took 4.80 s instead of 0.03 s (docs/log.md).
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode (no dropout, no checkpointing) and put every module's own mode back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def probe_head(model: nn.Module, forward: Any = None) -> Head:
    """Find the head of a causal LM and what the model does to its output.

    Args:
        model: a Hugging Face causal LM (not a PeftModel: its base).
        forward: the model's own forward, if `model.forward` is no longer it.

    Returns:
        The Head.

    Raises:
        ValueError: the model has no plain linear head, or its logits are not scale and cap of it.
            The message says which and what can be used instead.
    """
    head = find_linear_head(model)
    name = type(model).__name__
    config = getattr(model, "config", None)
    vocab = head.weight.shape[0]
    device = head.weight.device
    ids = torch.arange(1, _PROBE_TOKENS + 1, device=device).remainder(vocab).unsqueeze(0)
    seen: dict[str, Tensor] = {}

    def replace_hidden(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        seen["hidden"] = _spread(args[0], head)
        return (seen["hidden"], *args[1:])

    handle = head.register_forward_pre_hook(replace_hidden)
    try:
        with torch.no_grad(), evaluation_mode(model):
            output = (forward or model.forward)(input_ids=ids, return_dict=True)
            logits = getattr(output, "logits", None)
            hidden = seen.get("hidden")
            raw = None if hidden is None else linear(hidden, head.weight, head.bias).float()
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        raise ValueError(
            f"`model` must run on input_ids alone to be attached to; {name} raised "
            f"{type(error).__name__}: {error}. {_INSTEAD}"
        ) from error
    finally:
        handle.remove()
    if raw is None or not isinstance(logits, Tensor) or logits.shape != raw.shape:
        got = "no logits" if not isinstance(logits, Tensor) else f"logits {tuple(logits.shape)}"
        raise ValueError(
            f"`model` must make its logits by its output embeddings; {name} made {got}. {_INSTEAD}"
        )
    misses = []
    for scale, cap in _candidates(config):
        expected = scale_and_cap(raw, scale, cap)
        miss = float((expected - logits.float()).abs().max() / expected.abs().max())
        misses.append(f"scale {scale:g} cap {cap}: {miss:.1e}")
        if miss <= _tolerance(logits.dtype):
            return Head(head, scale, cap)
    raise ValueError(
        f"`model` must make its logits by scale and cap of its head's output; those of {name} are "
        f"not reproduced ({'; '.join(misses)}). {_INSTEAD}"
    )


_INSTEAD = "Compute logits yourself and use str_kernels.safety_cross_entropy on them."


def find_linear_head(model: nn.Module) -> nn.Linear:
    """Return the output embeddings, which must be an untouched nn.Linear."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if head is None:
        raise ValueError(
            "`model` must be a Hugging Face causal LM with output embeddings; got "
            f"{type(model).__name__}. {_INSTEAD}"
        )
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ValueError(
            "`model` must have a plain nn.Linear as its head (no adapter on it, not quantised); "
            f"got {type(head).__module__}.{type(head).__name__}. {_INSTEAD}"
        )
    return head


def _spread(hidden: Tensor, head: nn.Linear) -> Tensor:
    """Blow the hidden state up until its largest raw logit is _PROBE_LOGIT."""
    raw = linear(hidden, head.weight).float()
    return hidden * (_PROBE_LOGIT / raw.abs().max().clamp(min=1e-6)).to(hidden.dtype)


def _candidates(config: Any) -> list[tuple[float, float | None]]:
    """List the (scale, softcap) pairs that this config's numbers allow, the plainest first."""
    text_config = getattr(config, "text_config", None) or config
    scales = [1.0]
    scale = getattr(text_config, "logit_scale", None)  # cohere multiplies
    if isinstance(scale, (int, float)) and scale:
        scales.append(float(scale))
    divisor = getattr(text_config, "logits_scaling", None)  # granite divides
    if isinstance(divisor, (int, float)) and divisor:
        scales.append(1.0 / divisor)
    caps: list[float | None] = [None]
    cap = getattr(text_config, "final_logit_softcapping", None)  # gemma 2
    if isinstance(cap, (int, float)) and cap:
        caps.append(float(cap))
    return [(scale, cap) for scale in dict.fromkeys(scales) for cap in caps]


def _tolerance(dtype: torch.dtype) -> float:
    # float32 differs by the order of the products; a 16-bit model rounds its logits up to 3 times.
    return 1e-5 if dtype in (torch.float32, torch.float64) else 4 * torch.finfo(dtype).eps
