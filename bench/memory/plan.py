"""The planner's peaks compared with measured ones, for the built-in model on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from str_kernels.files.child_process import in_child
from str_kernels.integrations.plan.planner import MemoryPlan, PlanOptions, plan_of, read_config

from ..results import ROOT, Row, origin

TOKENS = (256, 512, 1024, 2048)
OTHERS_AT = 512
# Return freed blocks to the system at once: otherwise glibc keeps some, and how many depends on
# what was freed before.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}

PROTOCOL = (
    "SmolLM2-135M with LoRA r = {rank} on all linear layers but the head, {dtype}, {batch} rows of "
    "random tokens, each a label, on the CPU: the second step of AdamW, each in a fresh process. "
    "Measured are resident bytes, what is held between steps above a process with its libraries "
    "loaded, and the peak of the step above that. glibc returns blocks from 64 KiB on at once "
    "(MALLOC_MMAP_THRESHOLD_)."
)


class Case(NamedTuple):
    """One step to measure."""

    who: str
    tokens: int
    checkpointing: bool = False
    attention: str = "sdpa"
    padding: bool = False
    reference: str = "none"


def cases(tokens: Sequence[int], others_at: int | None) -> Iterator[Case]:
    """Yield the model's own loss and ours at each length, and the other cases at one length."""
    for checkpointing in (False, True):
        for count in tokens:
            yield Case("own", count, checkpointing)
            yield Case("ours", count, checkpointing)
    if others_at is not None:
        yield Case("by_hand", others_at)
        yield Case("ours", others_at, reference="live")
        yield Case("own", others_at, padding=True)
        yield Case("ours", others_at, attention="eager", padding=True)


def measure(
    tokens: Sequence[int] = TOKENS,
    *,
    batch: int = 2,
    rank: int = 8,
    dtype: str = "bfloat16",
    others_at: int | None = OTHERS_AT,
    advanced: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Measure each case, and plan it.

    Args:
        tokens: of a row.
        batch: rows.
        rank: of the adapters.
        dtype: of the weights.
        others_at: tokens of the cases by hand, with a reference pass, a mask and eager attention.
        advanced: called after each case.

    Returns:
        A row for each case: predicted and measured bytes, for the step and in total, and ratios.
    """
    config = read_config("builtin")
    base = origin("cpu", PROTOCOL.format(batch=batch, rank=rank, dtype=dtype))
    plans: dict[PlanOptions, MemoryPlan] = {}
    rows = []
    for case in cases(tokens, others_at):
        same: dict[str, Any] = {name: value for name, value in case._asdict().items()}
        who = same.pop("who")
        options = PlanOptions(batch_size=batch, lora_rank=rank, dtype=dtype, device="cpu", **same)
        if options not in plans:
            plans[options] = plan_of(config, options)
        plan = plans[options]
        predicted = plan.ways[who]
        found = _in_child(
            {
                **case._asdict(),
                "batch": batch,
                "rank": rank,
                "dtype": dtype,
                "threads": torch.get_num_threads(),
            }
        )
        rows.append(
            base
            | case._asdict()
            | {
                "batch": batch,
                "dtype": dtype,
                "predicted_step": predicted.step,
                "measured_step": found["step"],
                "step_ratio": predicted.step / found["step"],
                "predicted_peak": predicted.peak,
                "measured_peak": found["held"] + found["step"],
                "peak_ratio": predicted.peak / (found["held"] + found["step"]),
            }
        )
        advanced()
    return rows


def _in_child(job: dict[str, Any]) -> dict[str, int]:
    found: dict[str, int] = in_child(
        "bench.memory.plan_child", job, job["who"], folder=ROOT, environment=os.environ | _MALLOC
    )
    return found
