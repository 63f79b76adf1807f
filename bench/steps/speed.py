"""Time of the whole loss, head included, for all providers, eager and the bare products."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from str_kernels.loss_memory import available_bytes, measure_peak

from ..check import ROWS, Verdict, check
from ..inputs import Inputs, draw_inputs
from ..memory.child import FLOOR, peak_in_child
from ..results import Row, origin
from .heads import HeadShape
from .providers import ALL_OPTIONS, EAGER, Provider, bare_products, providers, version_of
from .timing import Step, quartiles, ratio_quartiles, rounds

PROTOCOL = (
    "Forward and backward. {count} rounds in which every provider runs once, the first of them "
    "another each round; medians and quartiles of the rounds, and medians of the rounds' ratios. "
    f"Right means: loss and gradients of {ROWS} rows agree with float32 by hand; gradient error is "
    "the largest entry of the difference over the largest entry. Memory is the peak above the "
    "inputs, on a CPU each in a process of its own. The bare products are what a head costs "
    "without any loss."
)


class Job(NamedTuple):
    """Sizes, dtype and device of a measurement."""

    shape: HeadShape
    tokens: int  # N
    ids: int = 64  # K
    dtype: torch.dtype = torch.bfloat16
    train_head: bool = False
    device: str = "cpu"


def measure(
    job: Job,
    count: int = 15,
    *,
    only: Sequence[str] = (),
    all_options: bool = False,
    memory: bool = True,
) -> list[Row]:
    """Check every provider, time those that are right, and measure their memory.

    Args:
        job: sizes, dtype and device.
        count: rounds.
        only: names, or beginnings of names, of the providers to list; all when empty.
        all_options: whether to add ours with every option of the loss on.
        memory: whether to measure memory (on a CPU a process for each provider).

    Returns:
        One row for each provider and one for the bare products. `status` is "timed"; or "absent",
        "wrong" or "failed" with the reason in `why` and nothing timed.
    """
    names = tuple(only)
    listed = [p for p in providers(all_options=all_options) if p.name.startswith(names or "")]
    if any(p.warm_up_whole for p in listed):
        torch.compiler.reset()  # its limit on recompilations counts over all sizes of a process
    inputs = _inputs(job, log_probs=any(p.name.endswith(ALL_OPTIONS) for p in listed))
    free = _free_bytes(job.device)
    verdicts = check(listed, inputs, free)
    right = [p for p in listed if verdicts[p.name].status == "right"]
    steps: dict[str, Step] = {p.name: step_of(p, inputs) for p in right}
    steps[FLOOR] = functools.partial(bare_products, inputs)
    times, failed = rounds(steps, count, job.device)
    base = _base(job, PROTOCOL.format(count=count), count)
    rows = []
    for provider in [*listed, Provider(FLOOR, lambda x: x.hidden)]:
        name = provider.name
        verdict = verdicts.get(name, Verdict("right"))
        if name in failed:
            verdict = Verdict("failed", failed[name], verdict.gradient_error)
        row = base | {
            "provider": name,
            "version": f"{provider.package} {version_of(provider.package)}",
            "status": "timed" if verdict.status == "right" else verdict.status,
            "why": verdict.why,
            "gradient_error": verdict.gradient_error,
        }
        row |= _numbers(name, times)
        row["peak_bytes"], trouble = None, ""
        if memory and name in times:
            row["peak_bytes"], trouble = _peak(name, steps[name], job)
        row["why"] = "; ".join(filter(None, [row["why"], trouble]))
        rows.append(row)
    return rows


def penalty_pairs(job: Job, count: int = 31, *, only: Sequence[str] = ()) -> list[Row]:
    """Measure what the penalty costs, by timing our loss with and without it in interleaved pairs.

    Args:
        job: sizes, dtype and device.
        count: pairs.
        only: names, or beginnings of names, of our providers; all when empty.

    Returns:
        One row for each of our backends: the median and quartiles of the pairs' ratios.
    """
    inputs = _inputs(job)
    rows = []
    found = {p.name: p for p in providers()}
    protocol = f"{count} pairs, with and without the penalty, either first in turn; ratio per pair"
    base = _base(job, protocol, count)
    for name, provider in found.items():
        without = found.get(f"{name}, no penalty")
        if without is None or not name.startswith(tuple(only) or ""):
            continue
        verdicts = check((provider, without), inputs)
        row = base | {"provider": name, "status": "timed", "why": ""}
        bad = next((v for v in verdicts.values() if v.status != "right"), None)
        if bad is not None:
            rows.append(row | {"status": bad.status, "why": bad.why})
            continue
        steps = {p.name: step_of(p, inputs) for p in (provider, without)}
        times, failed = rounds(steps, count, job.device)
        if failed:
            rows.append(row | {"status": "failed", "why": next(iter(failed.values()))})
            continue
        low, middle, high = quartiles(
            [a / b for a, b in zip(times[name], times[without.name], strict=True)]
        )
        rows.append(row | {"low_ratio": low, "median_ratio": middle, "high_ratio": high})
    return rows


def step_of(provider: Provider, inputs: Inputs) -> Step:
    """Return one forward and backward of the provider."""
    leaves = inputs.leaves()

    def step() -> None:
        torch.autograd.grad(provider.loss(inputs), leaves)

    return step


def _base(job: Job, protocol: str, count: int) -> Row:
    """Return the columns that all rows of a job share."""
    return origin(job.device, protocol) | {
        "N": job.tokens,
        "D": job.shape.width,
        "V": job.shape.vocab,
        "K": job.ids,
        "dtype": str(job.dtype).removeprefix("torch."),
        "train_head": job.train_head,
        "rounds": count,
    }


def _inputs(job: Job, log_probs: bool = False) -> Inputs:
    return draw_inputs(
        job.shape,
        job.tokens,
        job.ids,
        job.dtype,
        job.device,
        train_head=job.train_head,
        log_probs=log_probs,
    )


def _numbers(name: str, times: dict[str, list[float]]) -> Row:
    """Return the times of one provider; each is None if it was not timed."""
    row: Row = dict.fromkeys(("median_ms", "low_ms", "high_ms"))
    mine = times.get(name)
    if mine:
        low, middle, high = quartiles(mine)
        row = {"median_ms": 1e3 * middle, "low_ms": 1e3 * low, "high_ms": 1e3 * high}
    for column, other in (("against_eager", EAGER.name), ("against_products", FLOOR)):
        found = ratio_quartiles(mine, times.get(other)) if mine else None
        row[column] = found[1] if found else None
    return row


def _peak(name: str, step: Step, job: Job) -> tuple[int | None, str]:
    """Return the peak above the inputs, or None and the reason."""
    if job.device == "cuda":
        return measure_peak(step, job.device), ""
    try:
        return peak_in_child(name, *job[:5]), ""
    except RuntimeError as error:
        return None, str(error)


def _free_bytes(device: str) -> int | None:
    if device == "cuda":
        torch.cuda.empty_cache()  # memory that another size left in the cache is free too
        return torch.cuda.mem_get_info()[0]
    return available_bytes() or None  # 0 where the system does not say
