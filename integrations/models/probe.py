"""A forward of a few tokens that shows what a causal LM does to its head's output, and its loss.

The config alone is not trusted. `probe_head` feeds the head a chosen hidden state, reads the
model's logits, and keeps the (scale, softcap) that reproduces them. If none does, the model is
refused with the reason; so is a model whose own loss is not next-token cross-entropy.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ...op import scale_and_cap
from .heads import ModelHead, find_head, head_at, reason_against
from .modes import evaluation_mode, not_compiled
from .own_loss import auxiliary_loss, reason_against_loss
from .sharded_weights import in_memory, whole

# The largest raw logit of the probe. Far above ordinary caps (30), so that a cap shows even in
# bfloat16, and far below where float16 overflows.
_PROBE_LOGIT = 100.0
_PROBE_TOKENS = 8
# Errors that a model's own code may raise on the probe's short batch.
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


def _refusal(path: str, rule: str) -> ValueError:
    """Return the error for a model that cannot be attached to, with what to use instead."""
    return ValueError(f"`model` must {rule}. {_INSTEAD[path]}")


def probe_head(model: nn.Module) -> ModelHead:
    """Find the head of a causal LM and what the model does to its output.

    Args:
        model: a Hugging Face causal LM; for a PeftModel, its base model.

    Returns:
        The head.

    Raises:
        ValueError: the head's operands cannot be read, the logits are not its output scaled and
            capped, or the model's own loss is not next-token cross-entropy. The message says
            which, and what to use instead.
    """
    module = find_head(model)
    reason = reason_against(module, model)
    if reason is not None or module is None:
        raise _refusal("linear", reason or "have output embeddings")
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
        raise _refusal(
            "linear",
            f"make its logits by its output embeddings; {name} made logits {tuple(logits.shape)}",
        )
    head = _with_scale_and_cap(head, raw, logits, model)
    # A second run with the model's own hidden states: next to a cross-entropy of 100 a small
    # auxiliary loss would not be seen.
    _check_own_loss(model, "linear", head.device)
    return head


@not_compiled
def check_same_head(model: nn.Module, head: ModelHead) -> None:
    """Refuse a head that was replaced, wrapped or merged since it was probed."""
    module = find_head(model)
    if module is not head.module:
        raise ValueError("`model` must keep the head that it was attached with: attach it again")
    reason = reason_against(module, model)
    if reason is not None:
        raise _refusal("linear", reason)


def probe_logits(model: nn.Module) -> int:
    """Check that a model's loss is next-token cross-entropy of its logits.

    Args:
        model: as in `probe_head`.

    Returns:
        V, the width of its logits.

    Raises:
        ValueError: the model's own loss is something else.
    """
    device = next(model.parameters()).device
    return int(_check_own_loss(model, "logits", device).shape[-1])


def ignores_padding(model: nn.Module) -> bool:
    """Tell whether a row's logits stay the same when it is padded on the right and masked.

    They do not for PaliGemma without an image, whose attention is bidirectional. Running the row in
    a batch of two shows how much rounding a change of shape alone causes.
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


def _run_probe(model: nn.Module, path: str, device: torch.device) -> tuple[Tensor, Tensor, float]:
    """Return logits, ids and the model's own loss without its auxiliary loss."""
    name = type(model).__name__
    ids = torch.arange(1, _PROBE_TOKENS + 1, device=device).unsqueeze(0)
    try:
        with torch.no_grad(), evaluation_mode(model):
            output = model.forward(input_ids=ids, labels=ids, return_dict=True)
            logits, loss = getattr(output, "logits", None), getattr(output, "loss", None)
            if isinstance(loss, Tensor):
                loss = float(loss - auxiliary_loss(model, output))
    except _PROBE_ERRORS as error:
        raise _refusal(
            path,
            f"run on input_ids and labels alone to be attached to; {name} raised "
            f"{type(error).__name__}: {error}",
        ) from error
    if not isinstance(logits, Tensor) or not isinstance(loss, float):
        got = "no logits" if not isinstance(logits, Tensor) else "no loss"
        raise _refusal(path, f"return logits and a loss when given labels; {name} returned {got}")
    return logits, ids, loss


def _check_own_loss(model: nn.Module, path: str, device: torch.device) -> Tensor:
    """Refuse a model whose loss is not the one we would replace; return its logits."""
    logits, ids, own_loss = _run_probe(model, path, device)
    reason = reason_against_loss(model, logits, ids, own_loss)
    if reason is not None:
        raise _refusal(path, reason)
    return logits


def _raw_logits(head: ModelHead, hidden: Tensor) -> Tensor:
    rows = hidden.flatten(0, -2)
    weight, bias, low_rank = head.operands(rows)
    raw = linear(rows, whole(weight), None if bias is None else whole(bias)).float()
    if low_rank is not None:
        raw = raw + low_rank[0].float() @ whole(low_rank[1]).float().t()
    logits: Tensor = raw.unflatten(0, hidden.shape[:-1])
    return logits


def _with_scale_and_cap(
    head: ModelHead, raw: Tensor, logits: Tensor, model: nn.Module
) -> ModelHead:
    misses = []
    for scale, cap in _candidates(getattr(model, "config", None)):
        expected = scale_and_cap(raw, scale, cap)
        miss = float((expected - logits.float()).abs().max() / expected.abs().max())
        misses.append(f"scale {scale:g} cap {cap}: {miss:.1e}")
        if miss <= _tolerance(logits.dtype):
            return dataclasses.replace(head, logit_scale=scale, softcap=cap)
    raise _refusal(
        "linear",
        f"make its logits by scale and cap of its head's output; those of {type(model).__name__} "
        f"are not reproduced ({'; '.join(misses)})",
    )


# Names in configs for the factor on the head's output (or its divisor: both are tried) and the cap.
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def _candidates(config: Any) -> list[tuple[float, float | None]]:
    """List the (scale, softcap) pairs that a config's numbers allow, the simplest first."""
    text_config = getattr(config, "text_config", None) or config

    def numbers(names: tuple[str, ...]) -> list[float]:
        values = [getattr(text_config, name, None) for name in names]
        return [float(x) for x in values if isinstance(x, (int, float)) and x > 0]

    scales = [1.0, *(y for x in numbers(_SCALES) for y in (x, 1 / x))]
    caps = [None, *numbers(_CAPS)]
    return [(scale, cap) for scale in dict.fromkeys(scales) for cap in caps]


def _tolerance(dtype: torch.dtype) -> float:
    # In float32 only the order of the sums differs; a 16-bit model rounds its logits up to 3 times.
    return 1e-5 if dtype in (torch.float32, torch.float64) else 4 * torch.finfo(dtype).eps
