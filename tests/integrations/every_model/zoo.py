"""Every causal LM of transformers, tiny; and whether attach() computes its loss exactly.

`judge` compares with what a user would write without this package: the model's own loss, plus
the penalty made from two full sets of logits, plus that of two anchors.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tiny_models import batch_of
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from zoo_sizes import (
    ASKS_MORE,
    HEADS,
    KV_HEADS,
    LAYERS,
    OVERRIDES,
    PICTURES,
    SIZES,
    SPREAD,
    SPREADS,
    SWITCHED_ON,
    TELLING,
)

from str_kernels import AnchorPrompts, SafetyPenalty, SafetyTokens, attach
from str_kernels.attach_options import PathName
from str_kernels.integrations.anchors.prompts import AnchorRow

Mapping = Literal["causal-lm", "image-text-to-text"]
_AUTO: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "image-text-to-text": AutoModelForImageTextToText,
}
# Type -> class, of those whose class the causal-LM mapping has not already
CLASSES: dict[Mapping, dict[str, str]] = {
    "causal-lm": dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "image-text-to-text": {
        model_type: name
        for model_type, name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
        if name != MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    },
}
IDS = [5, 9, 77, 130]
WEIGHT = 0.8
# Of two lengths, so that one of them is padded; held at the last and at the last two positions.
ANCHORS = AnchorPrompts(
    [AnchorRow((7, 19, 101, 64, 33)), AnchorRow((12, 90, 55, 3, 118, 41, 27), held=2)],
    penalty_weight=0.5,
)

LOSS_BOUND = 2e-5  # of the loss: some float32 sums in another order
GRADIENT_BOUND = 1e-3  # of the largest entry of each parameter's gradient
LEAST_PENALTY = 100 * LOSS_BOUND  # of the loss, or the comparison would not see it

Kind = Literal["exact", "refused", "wrong", "not buildable"]


@dataclass(frozen=True)
class Outcome:
    """What became of one type.

    Attributes:
        kind: the verdict.
        reason: why it is not "exact"; the same at every seed.
        loss_error: |attached - naive| of the loss, relative; None where nothing was compared.
        gradient_error: the same of the worst parameter's gradient, of its largest entry.
        detail: numbers for whoever looks into it.
    """

    kind: Kind
    reason: str = ""
    loss_error: float | None = None
    gradient_error: float | None = None
    detail: str = ""


def tiny_config(model_type: str) -> Any:
    """Make the smallest config of a type that still has one layer of each of its kinds."""
    return _shrink(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}))


def _shrink(cls: type[Any], overrides: dict[str, Any]) -> Any:
    """Make a config of `cls` whose sizes are those of SIZES, and its nested configs' likewise."""
    default = cls(**{k[1:]: v for k, v in overrides.items() if k.startswith("+")})
    settings: dict[str, Any] = {}
    names = set(inspect.signature(cls.__init__).parameters)
    layers = _one_of_each_kind(default)
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            inner = {
                k.split(".", 1)[1]: v for k, v in overrides.items() if k.startswith(f"{name}.")
            }
            settings[name] = _shrink(type(value), inner)
        elif name in names and name != "torch_dtype":
            smaller = _smaller(name, value, default, layers)
            if smaller is not value:
                settings[name] = smaller
    settings.update({k: v for k, v in overrides.items() if "." not in k and k[0] != "+"})
    return cls(**settings)


def _smaller(name: str, value: Any, default: Any, layers: list[int] | None) -> Any:
    """Return the small value of one setting, or the very `value` where it stays."""
    if name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        return {"p": 0, "b": 1, "e": 2}[name[0]]
    if name in SWITCHED_ON:
        return True
    if name in TELLING:
        return TELLING[name]
    if name == "head_dim" and value is None:
        return SIZES[name]  # hidden / heads: some types compute it in their checkpoints' files only
    if layers is not None and _is_per_layer(value, _depth(default)):
        return [value[layer] for layer in layers]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    if "drop" in name or name.endswith("jitter_noise"):
        return type(value)(0)
    if name.endswith(("token_id", "token_index", "_index", "_lang_id")):
        return 0  # images and the like: the padding, which no batch holds
    if name in SPREADS:
        return SPREAD
    if layers is not None and name in LAYERS:
        return len(layers)
    if name in KV_HEADS:
        heads = next((vars(default)[n] for n in HEADS if n in vars(default)), None)
        return min(value, SIZES["num_attention_heads"] if heads == value else 2)
    return min(value, SIZES[name]) if name in SIZES else value


def _depth(config: Any) -> int | None:
    return next((vars(config)[name] for name in LAYERS if name in vars(config)), None)


def _is_per_layer(value: Any, depth: int | None) -> bool:
    """Say whether a list describes each layer; one whose entries all differ numbers layers."""
    if not isinstance(value, (list, tuple)) or len(value) != depth:
        return False
    return len({str(entry) for entry in value}) < len(value)


def _one_of_each_kind(config: Any) -> list[int] | None:
    """Choose layers, at least two, so that every combination in the per-layer lists is there."""
    depth = _depth(config)
    if not isinstance(depth, int):
        return None
    lists = [
        [str(entry) for entry in value]
        for value in vars(config).values()
        if _is_per_layer(value, depth)
    ]
    kinds = list(zip(*lists, strict=True)) or [()] * depth
    first = {kind: layer for layer, kind in reversed(list(enumerate(kinds)))}
    chosen = sorted(first.values())
    spare = [layer for layer in range(depth) if layer not in chosen]
    return sorted(chosen + spare[: max(0, 2 - len(chosen))])


def tiny_model(model_type: str, seed: int, mapping: Mapping = "causal-lm") -> Any:
    """Build a random model of a type, with no parameter left at a constant."""
    torch.manual_seed(seed)
    model = _AUTO[mapping].from_config(tiny_config(model_type), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # biases of 0, norms of 1 and projections that start at 0 would hide a term
            if parameter.ndim <= 1 or not parameter.any():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def with_image(
    model_type: str, config: Any, batch: dict[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """Put a picture of random pixels in front of each row."""
    rows, tokens = batch["input_ids"].shape[0], PICTURES[model_type]
    vision = config.vision_config
    generator = torch.Generator().manual_seed(seed)
    if hasattr(vision, "spatial_merge_size"):  # the Qwen family takes patches in one long list
        side = vision.spatial_merge_size * 2
        values = 3 * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.randn(rows * side**2, values, generator=generator)
        batch = {**batch, "image_grid_thw": torch.tensor([[1, side, side]] * rows)}
    else:
        pixels = torch.randn(rows, 3, *[vision.image_size] * 2, generator=generator)
        if hasattr(config, "scale_factor"):  # the Idefics family takes several images a row
            pixels = pixels.unsqueeze(1)
    image_token = getattr(config, "image_token_id", None)
    front = {"input_ids": image_token, "attention_mask": 1, "labels": -100}
    batch = {
        name: nn.functional.pad(value, (tokens, 0), value=front[name]) if name in front else value
        for name, value in batch.items()
    }
    is_image = (batch["input_ids"] == image_token).long()
    types = {"mm_token_type_ids": is_image} if "image_grid_thw" in batch else {}
    if model_type == "gemma3":
        types = {"token_type_ids": is_image}
    elif model_type == "paligemma":  # 1: what is to be learnt, seen by nothing before it
        types = {"token_type_ids": (batch["labels"] != -100).long()}
    return {**batch, **types, "pixel_values": pixels}


class _Naive:
    """The loss made of the model's own and of full logits, and the gradients of it."""

    def __init__(
        self,
        model: nn.Module,
        ref_logits: Tensor,
        ref_anchors: list[Tensor],
        batch: dict[str, Tensor],
    ) -> None:
        model.zero_grad()
        output = model(**batch)
        logits = output.logits.float()
        target = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        ce = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        kept = target != -100
        drift = (logits - ref_logits)[..., IDS][kept]
        penalty = WEIGHT * drift.square().mean(dim=-1).sum() / kept.sum()
        held = [
            (now - before)[:, IDS].square().mean(dim=-1)
            for now, before in zip(_at_anchors(model), ref_anchors, strict=True)
        ]
        loss = output.loss + penalty + ANCHORS.penalty_weight * torch.cat(held).mean()
        loss.backward()
        self.loss = float(loss.detach())
        self.own = float(output.loss.detach())
        self.penalty = float(penalty.detach())
        self.ce = float(ce.detach())
        self.gradients = _gradients(model)


def _at_anchors(model: nn.Module) -> list[Tensor]:
    """Return the logits (held, V) of each anchor, one by one and so without padding."""
    return [
        model(input_ids=torch.tensor([row.input_ids])).logits[0, -row.held :].float()
        for row in ANCHORS.rows
    ]


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """Clone them; none is a zero, since an unused parameter may get either."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def judge(
    model_type: str,
    seed: int,
    path: PathName = "linear",
    mapping: Mapping = "causal-lm",
    image: bool = False,
) -> Outcome:
    """Train one step with attach() and by hand, and compare loss and gradients.

    Args:
        model_type: a key of the mapping.
        seed: of the model, of the reference and of the batch.
        path: as in attach().
        mapping: which auto class builds it.
        image: put a picture into each row of the batch.
    """
    try:
        model = tiny_model(model_type, seed, mapping).train()
        ref_model = tiny_model(model_type, seed + 1, mapping)
        batch = batch_of(seed)
        if image:
            batch = with_image(model_type, model.config, batch, seed)
        if model_type in ASKS_MORE:
            return _refusal(model, ref_model, path)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            ref_logits = ref_model.eval()(**inputs).logits.float()
            ref_anchors = _at_anchors(ref_model)
        torch.manual_seed(seed)
        naive = _Naive(model, ref_logits, ref_anchors, batch)
        torch.manual_seed(seed + 1)  # a random number in the forward would now be another
        again = _Naive(model, ref_logits, ref_anchors, batch)
    except Exception as error:
        return Outcome("not buildable", _reason(error))
    if not _finite(naive):
        return Outcome("not buildable", "its own loss or gradient is not finite")
    if naive.loss != again.loss:
        detail = f"{naive.loss} and {again.loss}"
        return Outcome("not buildable", "its own loss is random", detail=detail)
    if naive.penalty < LEAST_PENALTY * naive.loss:
        detail = f"{naive.penalty} of {naive.loss}"
        return Outcome("not buildable", "its reference does not differ", detail=detail)
    if image and not _sees(naive):
        return Outcome("not buildable", "its loss does not hang on the picture")
    ref_model.train()  # attach() puts it into eval mode by itself
    model.zero_grad()
    tokens, penalty = SafetyTokens(ids=IDS), SafetyPenalty(WEIGHT)
    try:
        handle = attach(
            model,
            tokens,
            penalty=penalty,
            ref_model=ref_model,
            anchors=ANCHORS,
            path=path,
            positions="response",
        )
    except ValueError as error:
        return Outcome("refused", _reason(error))
    except Exception as error:
        return Outcome("wrong", f"attach() raised {_reason(error)}")
    try:
        with handle:
            loss = model(**batch).loss
            loss.backward()
    except Exception as error:
        return Outcome("wrong", f"attached, then raised {_reason(error)}")
    return _compare(naive, float(loss.detach()), _gradients(model))


def _refusal(model: nn.Module, ref_model: nn.Module, path: PathName) -> Outcome:
    try:
        attach(
            model, SafetyTokens(ids=IDS), ref_model=ref_model, path=path, positions="response"
        ).remove()
    except ValueError as error:
        return Outcome("refused", _reason(error))
    return Outcome("wrong", "attached, though its forward wants more than text")


def _sees(naive: _Naive) -> bool:
    return any("vis" in name and bool(grad.any()) for name, grad in naive.gradients.items())


def _finite(naive: _Naive) -> bool:
    return all(bool(grad.isfinite().all()) for grad in naive.gradients.values())


# What follows are numbers that the seed decides, or advice.
_END_OF_REASON = (
    ", which is what takes its place",
    " (scale ",
    ". attach(",
    ". Compute logits",
    " You can install",
)


def _reason(error: Exception) -> str:
    """Return what an error says in its first line, the same at every seed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    # a config's validator says which one it is first, and what is wrong second
    line = lines[1] if lines[0].startswith("Class validation") and lines[1:] else lines[0]
    for end in _END_OF_REASON:
        line = line.split(end)[0]
    if "can't allocate memory" in line:
        return "takes more memory than a tiny model may"
    if line.startswith("`model` "):
        return line.removeprefix("`model` ")
    return f"{type(error).__name__}: {line}"


def _compare(naive: _Naive, loss: float, got: dict[str, Tensor]) -> Outcome:
    """Judge by LOSS_BOUND, and for each parameter by GRADIENT_BOUND."""
    loss_error = abs(loss - naive.loss) / abs(naive.loss)
    # Some gradients are zero but for rounding: a key's bias, to which the softmax is blind, and
    # what is before a norm that takes it out again. Their entries are sums that cancel, of terms
    # as large as the model's other gradients, so 1e-6 of those is their rounding.
    floor = 1e-6 * max(float(grad.abs().max()) for grad in naive.gradients.values())
    worst, where = 0.0, ""
    for name, grad in naive.gradients.items():
        allowed = float(grad.abs().max()) + floor / GRADIENT_BOUND
        miss = float((got[name] - grad).abs().max()) / allowed
        if not miss <= worst:  # a nan is the worst
            worst, where = miss, name
    misses = [] if loss_error <= LOSS_BOUND else ["its loss is another"]
    misses += [] if worst <= GRADIENT_BOUND else ["its gradients are others"]
    detail = (
        f"loss {loss_error:.0e}, gradients {worst:.0e} (worst in {where}); attached {loss:.6g} "
        f"where {naive.loss:.6g} is due; own loss {naive.own:.6g}, cross-entropy {naive.ce:.6g}"
    )
    kind: Kind = "wrong" if misses else "exact"
    return Outcome(kind, " and ".join(misses), loss_error, worst, detail)
