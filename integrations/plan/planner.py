"""How much memory a fine-tuning would need, and how long its rows may be, from a config alone.

The model is built without weights, and a training step runs on fake tensors. So the memory of any
architecture's forward is counted, not estimated; see step_memory.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from transformers import AutoConfig

from ..loading import BUILTIN, builtin_model_folder
from .step_memory import (
    Loss,
    StepMemory,
    checkpoint_layers,
    gradient_bytes,
    measure_step,
    meta_model,
    optimizer_bytes,
    weight_bytes,
)

ReferenceMode = Literal["none", "live", "cached"]
Way = Literal["own", "by_hand", "chunked", "ours"]
WAYS: tuple[Way, ...] = get_args(Way)
_LOGGER = logging.getLogger("torch._subclasses.fake_tensor")
_CONFIG = "config.json"
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_FARTHER = (1, 4, 16)  # multiples of the given length at which a step is run, to see its growth
_LONGEST = 1 << 24


@dataclass(frozen=True)
class PlanOptions:
    """A fine-tuning to plan.

    Args:
        tokens: number of tokens in each row.
        batch_size: rows per forward.
        lora_rank: of adapters on all linear layers but the head; None trains every weight.
        dtype: of the weights; "auto" takes the config's.
        checkpointing: gradient checkpointing of the layers.
        attention: "sdpa", "eager", or "auto" for the model's default of the two.
        reference: "none", with the penalty only at anchors; "live", with one more forward for each
            batch; "cached", with logits from files.
        padding: whether rows of a batch differ in length, so that attention needs a mask; None
            means whenever a batch has several rows.
        accumulation: forwards per step.
        ids: K, the number of safety tokens.
        anchors: number of anchors per step with `reference="none"`.
        anchor_tokens: length of the longest anchor.
        device: "cpu" or "cuda", on which the loss's chunk size depends.
    """

    tokens: int
    batch_size: int = 8
    lora_rank: int | None = 8
    dtype: str = "auto"
    checkpointing: bool = False
    attention: str = "auto"
    reference: ReferenceMode = "none"
    padding: bool | None = None
    accumulation: int = 1
    ids: int = 96
    anchors: int = 4
    anchor_tokens: int = 48
    device: str = "cuda"

    def __post_init__(self) -> None:
        numbers = ("batch_size", "lora_rank", "accumulation", "ids", "anchors", "anchor_tokens")
        for name, least in (("tokens", 2), *((name, 1) for name in numbers)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be >= {least}; got {value}")
        for name, choices in (
            ("dtype", _DTYPES),
            ("attention", ("auto", "sdpa", "eager")),
            ("reference", get_args(ReferenceMode)),
            ("device", ("cpu", "cuda")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(choices)}; got {getattr(self, name)!r}"
                )

    @property
    def padded(self) -> bool:
        """Whether attention needs a mask."""
        return self.batch_size > 1 if self.padding is None else self.padding


@dataclass(frozen=True)
class WayPlan:
    """The memory of a step with one way to compute the loss, bytes.

    Attributes:
        loss: peak while the loss is computed, above the activations.
        reference: the reference's logits, kept through the step.
        step: peak above what is kept between steps.
        peak: peak of everything.
        longest: tokens of the longest rows that fit into the memory; None if none was given.
    """

    loss: int
    reference: int
    step: int
    peak: int
    longest: int | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a fine-tuning, bytes.

    Attributes:
        options: what was planned.
        dtype: of the weights.
        weights: with adapters and buffers.
        reference_weights: of the frozen copy that a model without adapters needs.
        gradients: of the trained weights.
        optimizer: AdamW's state, in the dtypes of the trained weights, as Trainer makes it.
        activations: kept by the forward for the backward.
        positions: maximum number of tokens in the config; None if it has none.
        memory: the memory that was given.
        ways: the model's own loss (no STR), STR computed naively from all logits of two models, STR
            in a PyTorch loop over chunks, and str_kernels'.
    """

    options: PlanOptions
    dtype: str
    weights: int
    reference_weights: int
    gradients: int
    optimizer: int
    activations: int
    positions: int | None
    memory: int | None
    ways: dict[Way, WayPlan]

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {"schema_version": 1, **asdict(self)}


def read_config(name: str) -> Any:
    """Read a model's config from files on this machine.

    Args:
        name: "builtin", a folder with config.json, such a file, or the id of a model whose config
            is in transformers' cache.

    Returns:
        The config.

    Raises:
        ValueError: there is no config, it is broken, or it needs code from its folder.
    """
    source = str(builtin_model_folder()) if name == BUILTIN else name
    if Path(source).is_dir() and not (Path(source) / _CONFIG).is_file():
        raise ValueError(f"`model` must be a folder with {_CONFIG}; got {name!r} without one")
    try:
        return AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a broken config may raise anything
        raise ValueError(
            f"`model` must be 'builtin', a folder, a {_CONFIG} or a hub id whose config is in "
            f"transformers' cache; got {name!r}: {_first_line(error)}"
        ) from error


def plan_of(
    config: Any,
    options: PlanOptions,
    *,
    memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MemoryPlan:
    """Plan a fine-tuning of the model that a config describes, without reading or making weights.

    Args:
        config: of transformers, such as `model.config`.
        options: what to plan.
        memory: available memory, bytes; needed for `longest`.
        progress: called with the number of runs done and in total.

    Returns:
        The plan.

    Raises:
        ValueError: the model is not a causal LM whose forward runs without values, it is quantized,
            or a number is out of range.

    Notes:
        Only tensors are counted. Not counted are a CUDA context (about 0.5 GB), buffers of
        libraries and collectives, and memory that the allocator keeps unused.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("`model` must not be quantized to be planned; its config says it is")
    if memory is not None and memory <= 0:
        raise ValueError(f"`memory` must be > 0; got {memory}")
    stored = getattr(config, "dtype", None) or torch.float32
    dtype = stored if options.dtype == "auto" else getattr(torch, options.dtype)
    lengths = [options.tokens * times for times in (_FARTHER if memory is not None else (1,))]
    done = 0

    def run(rows: int, tokens: int, padding: bool) -> StepMemory:
        nonlocal done
        model = meta_model(config, dtype, options.attention, options.lora_rank)
        if options.checkpointing:
            checkpoint_layers(model)
        found = measure_step(
            model, rows, tokens, options.ids, padding=padding, device=options.device
        )
        done += 1
        if progress is not None:
            progress(done, len(lengths) + 1)
        return found

    with _readable():
        model = meta_model(config, dtype, options.attention, options.lora_rank)
        weights = weight_bytes(model)
        copy = 0
        if options.lora_rank is None and options.reference != "cached":
            copy = weights
        held = weights + optimizer_bytes(model)
        anchors = run(options.anchors, options.anchor_tokens, True)
        steps = [run(options.batch_size, tokens, options.padded) for tokens in lengths]
    ways = {}
    for way in WAYS:
        own_held = held + (0 if way == "own" else copy)
        takes = _take(way, steps[0], anchors, options)
        peak = own_held + takes.step
        longest = None
        if memory is not None:
            curve = [_take(way, step, anchors, options).phases for step in steps]
            longest = _longest(lengths, curve, memory - own_held, _positions(config))
        ways[way] = WayPlan(takes.loss, takes.reference, takes.step, peak, longest)
    return MemoryPlan(
        options=options,
        dtype=str(dtype).removeprefix("torch."),
        weights=weights,
        reference_weights=copy,
        gradients=gradient_bytes(model),
        optimizer=held - weights,
        activations=steps[0].activations,
        positions=_positions(config),
        memory=memory,
        ways=ways,
    )


class _Takes(NamedTuple):
    loss: int
    reference: int
    phases: tuple[int, ...]  # the peaks of the parts of a step

    @property
    def step(self) -> int:
        return max(self.phases)


def _take(way: Way, step: StepMemory, anchors: StepMemory, options: PlanOptions) -> _Takes:
    """Return the memory of a step with one way to compute the loss."""
    mode: str = "live" if way == "by_hand" else "none" if way == "own" else options.reference
    loss: Loss = getattr(step, "ours_plain" if (way, mode) == ("ours", "none") else way)
    held = 0 if mode == "none" else loss.held
    anchored = mode == "none" and way != "own"
    # left by an earlier forward of the same step
    gradients = options.accumulation > 1 and step.gradients
    phases = [
        step.forward + held + gradients,
        step.activations + loss.peak + held + gradients,
        # the anchors' backward comes first
        (step.backward_again if gradients or anchored else step.backward) + held,
    ]
    if mode == "live":
        phases.append(step.reference_by_hand if way == "by_hand" else step.reference + held)
    if anchored:
        # the anchors' forward and backward run while the rows' activations wait for their backward
        at_anchors: Loss = getattr(anchors, way)
        phases.append(
            step.activations
            + loss.left
            + gradients
            + max(
                anchors.forward,
                anchors.activations + at_anchors.peak,
                anchors.backward,
                anchors.reference,
            )
        )
    return _Takes(loss.peak, held, tuple(phases))


def _longest(
    lengths: Sequence[int], curve: Sequence[Sequence[int]], room: int, positions: int | None
) -> int:
    """Return the longest length whose phases all fit; each is at most quadratic in the length."""

    def powers(tokens: Sequence[int]) -> Tensor:
        x = torch.tensor(tokens, dtype=torch.float64) / lengths[0]
        return torch.stack([torch.ones_like(x), x, x * x], dim=1)

    terms = torch.linalg.solve(powers(lengths), torch.tensor(curve, dtype=torch.float64))

    def fits(tokens: int) -> bool:
        return bool((powers([tokens]) @ terms <= room).all())

    low, high = 1, positions or _LONGEST
    if fits(high):
        return high
    if not fits(low):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _positions(config: Any) -> int | None:
    text = config.get_text_config(decoder=True)
    found = getattr(text, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Report in one line why a model's step cannot run: it needs values, or PEFT refuses it."""
    before = _LOGGER.level
    try:
        _LOGGER.setLevel(logging.CRITICAL)  # it would log a traceback
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries warn again in the real run
            yield
    except Exception as error:  # the forward of some model may raise anything
        if isinstance(error, ValueError) and str(error).startswith("`model`"):
            raise  # already one of our messages
        raise ValueError(
            "`model` must be a causal LM that can be trained so, and without the values of its "
            f"tensors; got {type(error).__name__}: {_first_line(error)}"
        ) from error
    finally:
        _LOGGER.setLevel(before)
