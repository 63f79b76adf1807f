"""Timing in interleaved rounds, and the statistics of their results."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Step = Callable[[], object]


def seconds(step: Step, device: str) -> float:
    """Time one step, including the device's work."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def rounds(
    steps: Mapping[str, Step], count: int, device: str
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Run every step once per round, `count` times after one round to warm up.

    Each round begins with the next step in the list, because the first of a round may find caches
    and clock rates in a different state than the last.

    Returns:
        Seconds by name, one entry per round; and for each step that failed, which is then left
        out, one line of its error.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    failed: dict[str, str] = {}
    for number in range(count + 1):
        names = [name for name in steps if name not in failed]
        turn = number % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            try:
                taken = seconds(steps[name], device)
            except Exception as error:  # a provider's crash, mostly out of memory, is a result
                failed[name] = one_line(error)
                times.pop(name)
                continue
            if number:
                times[name].append(taken)
    return times, failed


def times_of_all(steps: Mapping[str, Step], count: int, device: str) -> dict[str, list[float]]:
    """Do `rounds` of steps that must all run; a RuntimeError names those that failed."""
    times, failed = rounds(steps, count, device)
    if failed:
        raise RuntimeError(f"a step failed: {failed}")
    return times


def one_line(error: BaseException) -> str:
    """Return the error's type and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def ratio_quartiles(
    mine: Sequence[float], other: Sequence[float] | None
) -> tuple[float, float, float] | None:
    """Return the quartiles of the rounds' ratios; None if there is no other."""
    if other is None:
        return None
    return quartiles([a / b for a, b in zip(mine, other, strict=True)])


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
