"""What is known of a Hugging Face causal LM: what it makes of its head's output, and its loss.

Nothing is believed from a config alone. `probe_head` feeds the head a chosen hidden state, looks at
the logits that the model makes of it, and keeps the (scale, softcap) that reproduces them; a model
that none reproduces is refused with the reason. So is one whose own loss is another than the one
that is to take its place.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from ...op import IGNORE_INDEX, scale_and_cap
from .heads import Head, find_head, head_at, reason_against
from .sharded_weights import in_memory, whole

# The largest raw logit of the probe. Far above ordinary caps (30), so that a cap shows even in
# bfloat16, and far below where float16 overflows.
_PROBE_LOGIT = 100.0
_PROBE_TOKENS = 8
# What a model that cannot take the probe may raise: anything its own code does with a short batch.
_PROBE_ERRORS = (
    TypeError,
    ValueError,
    RuntimeError,  # NotImplementedError is one
    AttributeError,
    LookupError,
    AssertionError,
    ImportError,
)
_INSTEAD = {
    "linear": "attach(..., path='logits') may do: it asks for no head and keeps all logits.",
    "logits": "Compute logits yourself and use str_kernels.safety_cross_entropy on them.",
}


def refuse(path: str, rule: str) -> ValueError:
    """Return the error of a model that cannot be attached to, which says what may be used."""
    return ValueError(f"`model` must {rule}. {_INSTEAD[path]}")


_Function = TypeVar("_Function", bound=Callable[..., Any])


def runs_the_model(function: _Function) -> _Function:
    """Mark what calls a model's forward: torch.compile leaves it alone, and compiles the model."""
    return cast("_Function", torch.compiler.disable(function, recursive=False))


def not_compiled(function: _Function) -> _Function:
    """Mark what torch.compile leaves alone with all that it calls: the loss is one op anyway."""
    return cast("_Function", torch.compiler.disable(function))


@contextlib.contextmanager
def contiguous_head_input(model: nn.Module) -> Iterator[None]:
    """Let the head see contiguous states, as in generate()'s first step it does not.

    On a CPU torch's linear of a strided (B, 1, D) copies the whole head for every row; 16 rows and
    a head of 28 M elements in bfloat16 took 4.80 s instead of 0.03 s (docs/log.md).
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


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode (no dropout, no checkpointing) and put every module's own mode back.

    bitsandbytes' 4-bit layers are left in training mode, which changes nothing of what they say:
    on a CPU with AVX512-BF16 their first forward in eval mode packs the weights anew for good, and
    later ones have no backward.
    """
    before = [(module, module.training) for module in model.modules()]
    for module, _ in before:
        module.training = _is_4bit(module)
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _is_4bit(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "quant_type", None) in ("nf4", "fp4")


def keep_4bit_layers_training(model: nn.Module) -> None:
    """Put 4-bit layers back into training mode, in which they compute the same; see above."""
    for module in model.modules():
        if _is_4bit(module):
            module.training = True


def is_packed(module: nn.Module) -> bool:
    """Tell a 4-bit layer that was evaluated on a CPU: its forward has no backward any more."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def probe_head(model: nn.Module) -> Head:
    """Find the head of a causal LM and what the model does to its output.

    Args:
        model: a Hugging Face causal LM (not a PeftModel: its base).

    Returns:
        The Head.

    Raises:
        ValueError: the head's operands cannot be read, the logits are not scale and cap of its
            output, or the model's own loss is not next-token cross-entropy. The message says
            which and what can be used instead.
    """
    module = find_head(model)
    reason = reason_against(module, model)
    if reason is not None or module is None:
        raise refuse("linear", reason or "have output embeddings")
    head = head_at(module)
    seen: dict[str, Tensor] = {}

    def replace_hidden(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if "raw" in seen:
            raise RuntimeError("its forward called its output embeddings more than once")
        hidden = args[0]
        spread = hidden * (_PROBE_LOGIT / _raw_logits(head, hidden).abs().max().clamp(min=1e-6)).to(
            hidden.dtype
        )
        seen["raw"] = _raw_logits(head, spread)
        return (spread, *args[1:])

    handle = module.register_forward_pre_hook(replace_hidden)
    try:
        with in_memory(module):
            logits, *_ = _run_probe(model, "linear", head.device)
    finally:
        handle.remove()
    name = type(model).__name__
    raw = seen.get("raw")
    if raw is None or logits.shape != raw.shape:
        raise refuse(
            "linear",
            f"make its logits by its output embeddings; {name} made logits {tuple(logits.shape)}",
        )
    head = _with_scale_and_cap(head, raw, logits, model)
    # with its own hidden states: beside a cross-entropy of 100 a small auxiliary loss is not seen
    _check_own_loss(model, "linear", *_run_probe(model, "linear", head.device))
    return head


def check_own_forward(model: nn.Module) -> None:
    """Refuse a model whose class has a forward of Unsloth's.

    It makes the loss in kernels of its own, of a head that it may not call, and keeps buffers
    between the forwards of a step.
    """
    module = str(getattr(type(model).forward, "__module__", ""))
    if module.partition(".")[0] in ("unsloth", "unsloth_zoo"):
        raise ValueError(
            f"`model` must have transformers' own forward; got {module}. Unsloth makes the loss in "
            "kernels of its own: load the model by transformers, or use the functions of "
            "str_kernels on hidden states"
        )


@not_compiled
def check_head(model: nn.Module, head: Head) -> None:
    """Refuse to go on with a head that was replaced, wrapped or merged since it was probed."""
    module = find_head(model)
    if module is not head.module:
        raise ValueError("`model` must keep the head that it was attached with: attach it again")
    reason = reason_against(module, model)
    if reason is not None:
        raise refuse("linear", reason)


def probe_logits(model: nn.Module) -> int:
    """Check that a model's loss is next-token cross-entropy of its logits.

    Args:
        model: as in `probe_head`.

    Returns:
        V, the width of its logits.

    Raises:
        ValueError: it is something else.
    """
    device = next(model.parameters()).device
    logits, ids, own_loss = _run_probe(model, "logits", device)
    _check_own_loss(model, "logits", logits, ids, own_loss)
    return int(logits.shape[-1])


def ignores_padding(model: nn.Module) -> bool:
    """Tell whether a row's logits stay as they are when it is padded on the right and masked.

    Not so for PaliGemma without a picture, whose attention looks both ways. The same row in a batch
    of two says how far other products round.
    """
    device = next(model.parameters()).device
    ids = torch.arange(1, _PROBE_TOKENS + 1, device=device).unsqueeze(0)
    mask = torch.ones_like(ids)

    def logits(ids: Tensor, mask: Tensor) -> Tensor:  # of the first row, centred
        output = model.forward(input_ids=ids, attention_mask=mask, return_dict=True)
        found: Tensor = output.logits[0, :_PROBE_TOKENS].float()
        return found - found.mean(dim=-1, keepdim=True)

    with torch.no_grad(), evaluation_mode(model):
        here = logits(ids, mask)
        twice = logits(ids.repeat(2, 1), mask.repeat(2, 1))
        padded = logits(*(nn.functional.pad(x, (0, 3)) for x in (ids, mask)))
    eps = torch.finfo(next(model.parameters()).dtype).eps
    allowed = torch.maximum(4 * (twice - here).norm(), max(1e-4, 4 * eps) * here.norm())
    return bool((padded - here).norm() <= allowed)


@not_compiled
def checkpoints(model: nn.Module) -> bool:
    """Tell whether gradient checkpointing is on, under which transformers makes no cache."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def auxiliary_loss(model: nn.Module, output: Any) -> Tensor | float:
    """Return what a mixture-of-experts model adds to its loss by itself."""
    auxiliary = getattr(output, "aux_loss", None)
    if not isinstance(auxiliary, Tensor):
        return 0.0
    config = getattr(model, "config", None)
    for owner in (model, getattr(config, "text_config", None)):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            coefficient = getattr(owner, name, None)
            if coefficient is not None:
                return auxiliary * float(coefficient)
    return 0.0  # the probe has compared the model's own loss with this


def shift(labels: Any) -> Tensor:  # (B, T)
    """Position t predicts label t + 1; the last one predicts nothing."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def _run_probe(model: nn.Module, path: str, device: torch.device) -> tuple[Tensor, Tensor, float]:
    """Return logits, ids and the model's own loss without what it adds to the cross-entropy."""
    name = type(model).__name__
    ids = torch.arange(1, _PROBE_TOKENS + 1, device=device).unsqueeze(0)
    try:
        with torch.no_grad(), evaluation_mode(model):
            output = model.forward(input_ids=ids, labels=ids, return_dict=True)
            logits, loss = getattr(output, "logits", None), getattr(output, "loss", None)
            if isinstance(loss, Tensor):
                loss = float(loss - auxiliary_loss(model, output))
    except _PROBE_ERRORS as error:
        raise refuse(
            path,
            f"run on input_ids and labels alone to be attached to; {name} raised "
            f"{type(error).__name__}: {error}",
        ) from error
    if not isinstance(logits, Tensor) or not isinstance(loss, float):
        got = "no logits" if not isinstance(logits, Tensor) else "no loss"
        raise refuse(path, f"return logits and a loss when given labels; {name} returned {got}")
    return logits, ids, loss


def _check_own_loss(
    model: nn.Module, path: str, logits: Tensor, ids: Tensor, own_loss: float
) -> None:
    """Refuse a model whose loss we would silently replace by another one."""
    if logits.shape[:2] != ids.shape:
        raise refuse(
            path,
            f"return one row of logits per token; {type(model).__name__} returned "
            f"{tuple(logits.shape)} for {ids.shape[1]} tokens",
        )
    target = shift(ids).to(logits.device).flatten()
    rows = logits.flatten(0, 1)
    expected = float(cross_entropy(rows.float(), target, ignore_index=IGNORE_INDEX))
    in_dtype = float(cross_entropy(rows, target, ignore_index=IGNORE_INDEX))
    # An unshifted loss is off by nats, but an auxiliary loss may be small. Some models compute
    # theirs in 16 bits.
    if not min(abs(own_loss - x) for x in (expected, in_dtype)) <= 1e-5 * max(abs(expected), 1.0):
        raise refuse(
            path,
            "have next-token cross-entropy as its own loss, which is what takes its place; that "
            f"of {type(model).__name__} is {own_loss:.6g} where cross-entropy is {expected:.6g}",
        )


def _raw_logits(head: Head, hidden: Tensor) -> Tensor:
    rows = hidden.flatten(0, -2)
    weight, bias, low_rank = head.operands(rows)
    raw = linear(rows, whole(weight), None if bias is None else whole(bias)).float()
    if low_rank is not None:
        raw = raw + low_rank[0].float() @ whole(low_rank[1]).float().t()
    logits: Tensor = raw.unflatten(0, hidden.shape[:-1])
    return logits


def _with_scale_and_cap(head: Head, raw: Tensor, logits: Tensor, model: nn.Module) -> Head:
    misses = []
    for scale, cap in _candidates(getattr(model, "config", None)):
        expected = scale_and_cap(raw, scale, cap)
        miss = float((expected - logits.float()).abs().max() / expected.abs().max())
        misses.append(f"scale {scale:g} cap {cap}: {miss:.1e}")
        if miss <= _tolerance(logits.dtype):
            return dataclasses.replace(head, logit_scale=scale, softcap=cap)
    raise refuse(
        "linear",
        f"make its logits by scale and cap of its head's output; those of {type(model).__name__} "
        f"are not reproduced ({'; '.join(misses)})",
    )


# What configs call the factor on the head's output (or the divisor: both are tried) and its cap.
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def _candidates(config: Any) -> list[tuple[float, float | None]]:
    """List the (scale, softcap) pairs that this config's numbers allow, the plainest first."""
    text_config = getattr(config, "text_config", None) or config

    def numbers(names: tuple[str, ...]) -> list[float]:
        values = [getattr(text_config, name, None) for name in names]
        return [float(x) for x in values if isinstance(x, (int, float)) and x > 0]

    scales = [1.0, *(y for x in numbers(_SCALES) for y in (x, 1 / x))]
    caps = [None, *numbers(_CAPS)]
    return [(scale, cap) for scale in dict.fromkeys(scales) for cap in caps]


def _tolerance(dtype: torch.dtype) -> float:
    # float32 differs by the order of the products; a 16-bit model rounds its logits up to 3 times.
    return 1e-5 if dtype in (torch.float32, torch.float64) else 4 * torch.finfo(dtype).eps
