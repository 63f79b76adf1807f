"""The clock: interleaved rounds, and what is read from them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Step = Callable[[], object]


def seconds(step: Step, device: str) -> float:
    """Time one step, the device's work included."""
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

    The round's first step moves on by one each time: who runs first may find another state of the
    caches, and of the clock, than who runs last.

    Returns:
        Seconds by name, one entry per round; and one line of error of each step that failed, which
        leaves the rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    failed: dict[str, str] = {}
    for number in range(count + 1):
        names = [name for name in steps if name not in failed]
        turn = number % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            try:
                taken = seconds(steps[name], device)
            except Exception as error:  # another's crash, out of memory above all, is a result
                failed[name] = one_line(error)
                times.pop(name)
                continue
            if number:
                times[name].append(taken)
    return times, failed


def all_rounds(steps: Mapping[str, Step], count: int, device: str) -> dict[str, list[float]]:
    """Return the seconds of `rounds`.

    Raises:
        RuntimeError: a step failed.
    """
    times, failed = rounds(steps, count, device)
    if failed:
        raise RuntimeError("; ".join(f"{name} failed: {why}" for name, why in failed.items()))
    return times


def one_line(error: BaseException) -> str:
    """Return the error's type and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def ratio_quartiles(
    mine: Sequence[float], other: Sequence[float] | None
) -> tuple[float, float, float] | None:
    """Return the quartiles of the rounds' ratios; None where there is no other."""
    if other is None:
        return None
    return quartiles([a / b for a, b in zip(mine, other, strict=True)])


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def milliseconds(seconds: Sequence[float]) -> dict[str, Any]:
    """Return the quartiles in ms, as columns of a row."""
    names = ("low_ms", "median_ms", "high_ms")
    return dict(zip(names, (1e3 * value for value in quartiles(seconds)), strict=True))
