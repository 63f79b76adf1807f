"""How time grows with N, V and D, and memory with N: one figure, and the lines fitted to it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from str_kernels.atomic import replacing

from ..inputs import draw_inputs
from ..results import Row, origin
from ..steps.heads import HeadShape
from ..steps.providers import providers
from ..steps.speed import step_of
from ..steps.timing import quartiles, rounds
from .child import peak_in_child
from .memory import OURS

SIZES: dict[str, tuple[int, ...]] = {
    "N": (512, 1024, 2048, 4096),
    "V": (4096, 8192, 16384, 32768),
    "D": (128, 256, 512, 1024),
    "memory, N": (1024, 4096, 16384),
}
_MIDDLE = {"N": 1024, "V": 16384, "D": 256}  # what stays where it is while one of them grows
_IDS = 64
_COLOUR, _FIT = "#1b6ca8", "#888888"

PROTOCOL = (
    "Ours, backend torch on a CPU and triton on a GPU, bfloat16, frozen head, K = 64, forward and "
    "backward. Time: {count} rounds of all sizes in turn, medians and quartiles. Memory: peak "
    "above the inputs and the hidden states' gradient, in a fresh process on the CPU. Lines: least "
    "squares of the relative errors."
)


def measure(
    sizes: Mapping[str, Sequence[int]] = SIZES, count: int = 7, device: str = "cpu"
) -> list[Row]:
    """Measure every size.

    Args:
        sizes: by what grows: "N", "V", "D", or "memory, N".
        count: rounds.
        device: "cpu" or "cuda"; memory is measured on the CPU.

    Returns:
        One row for each size: `grows`, `size`, milliseconds or bytes in `value`, `low` and `high`,
        and the line through all sizes of its kind.
    """
    name = "ours (triton)" if device == "cuda" else OURS
    provider = next(p for p in providers() if p.name == name)
    base = origin(device, PROTOCOL.format(count=count))
    timed = {what: sizes[what] for what in ("N", "V", "D") if what in sizes}
    steps = {}
    for what, every in timed.items():
        for size in every:
            now = _MIDDLE | {what: size}
            inputs = draw_inputs(HeadShape(now["V"], now["D"]), now["N"], _IDS, device=device)
            steps[f"{what} {size}"] = step_of(provider, inputs)
    times, failed = rounds(steps, count, device)
    if failed:
        raise RuntimeError("; ".join(f"{name}: {why}" for name, why in failed.items()))
    rows = []
    for what, every in timed.items():
        values = [quartiles([1e3 * s for s in times[f"{what} {size}"]]) for size in every]
        rows += _rows(base, what, every, values)
    every = sizes.get("memory, N", ())
    if every:
        head = HeadShape(_MIDDLE["V"], _MIDDLE["D"])
        of = functools.partial(peak_in_child, OURS, head, ids=_IDS, dtype=torch.bfloat16)
        beyond = [of(tokens=n) - n * head.width * torch.bfloat16.itemsize for n in every]
        rows += _rows(base, "memory, N", every, [(peak, peak, peak) for peak in beyond])
    return rows


def _rows(
    base: Row, what: str, sizes: Sequence[int], values: Sequence[tuple[float, float, float]]
) -> list[Row]:
    line = fitted_line(sizes, [middle for _, middle, _ in values])
    return [
        base
        | {
            "grows": what,
            "size": size,
            "value": middle,
            "low": low,
            "high": high,
            "unit": "bytes" if what.startswith("memory") else "ms",
            **line._asdict(),
        }
        for size, (low, middle, high) in zip(sizes, values, strict=True)
    ]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw one panel for each thing that grows; a PNG."""
    kinds = list(dict.fromkeys(row["grows"] for row in rows))
    figure = Figure(figsize=(3.2 * len(kinds), 3.2), layout="constrained")
    for axes, what in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        mine = [row for row in rows if row["grows"] == what]
        memory = mine[0]["unit"] == "bytes"
        unit = 1e6 if memory else 1.0
        x, y = [row["size"] for row in mine], [row["value"] / unit for row in mine]
        spread = [
            [(row["value"] - row["low"]) / unit for row in mine],
            [(row["high"] - row["value"]) / unit for row in mine],
        ]
        axes.errorbar(x, y, yerr=spread, fmt="o", color=_COLOUR, capsize=3)
        offset, slope, off = (mine[0][name] for name in Line._fields)
        ends = (0, x[-1])
        axes.plot(ends, [(offset + slope * n) / unit for n in ends], color=_FIT, zorder=0)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0, top=1.15 * max(y))
        axes.set_xticks(x[-2:])
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_title(f"off the line by at most {off:.0%}", fontsize=10)
        axes.set_xlabel(what.removeprefix("memory, "))
        axes.set_ylabel("peak without the gradient, MB" if memory else "time, ms")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


class Line(NamedTuple):
    """A straight line, and how far the farthest value is from it, relative to that value."""

    at_0: float
    per_one: float
    off: float


def fitted_line(sizes: Sequence[float], values: Sequence[float]) -> Line:
    """Fit value = at_0 + per_one size by least squares of the relative errors."""
    per_one, at_0 = numpy.polyfit(sizes, values, 1, w=[1 / value for value in values])
    off = max(abs(at_0 + per_one * x - y) / y for x, y in zip(sizes, values, strict=True))
    return Line(float(at_0), float(per_one), float(off))
