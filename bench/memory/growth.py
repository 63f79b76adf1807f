"""How time grows with N, V and D, and memory with N: one figure, and the fitted lines."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from matplotlib.ticker import StrMethodFormatter

from str_kernels.integrations.figures import BLUE, GREY, new_figure, save, style, whiskers

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
_MIDDLE = {"N": 1024, "V": 16384, "D": 256}  # the values of the others while one of them grows
_IDS = 64
_MEANS = {"N": "tokens", "V": "vocabulary", "D": "width"}

PROTOCOL = (
    "Ours, backend auto, bfloat16, frozen head, K = 64, forward and "
    "backward. Time: {count} rounds of all sizes in turn, medians and quartiles. Memory: peak "
    "above the inputs and the hidden states' gradient, in a fresh process on the CPU. Lines: least "
    "squares of the relative errors."
)


def measure(
    sizes: Mapping[str, Sequence[int]] = SIZES, count: int = 7, device: str = "cpu"
) -> list[Row]:
    """Measure every size.

    Args:
        sizes: the sizes for each kind of growth: "N", "V", "D" or "memory, N".
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


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw one panel for each kind of growth as a PNG.

    Args:
        rows: of one `measure`, or of its file.
        path: the PNG file.
    """
    kinds = list(dict.fromkeys(row["grows"] for row in rows))
    off = {what: next(float(row["off"]) for row in rows if row["grows"] == what) for what in kinds}
    times = [most for what, most in off.items() if not what.startswith("memory")]
    # As the committed rows word it, which were measured on a CPU; later ones say "auto".
    protocol = rows[0]["protocol"].replace("torch on a CPU and triton on a GPU", "torch")
    figure = new_figure(
        3.4,
        f"Time is a straight line in N, V and D, to within {100 * max(times, default=0):.0f} %",
        f"{rows[0]['device']}, torch {rows[0]['torch']}. {protocol} Within: the "
        "farthest median's distance from its line.",
    )
    for axes, what in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        mine = [row for row in rows if row["grows"] == what]
        memory = mine[0]["unit"] == "bytes"
        unit = 1e6 if memory else 1.0
        x = [int(row["size"]) for row in mine]
        y, low, high = (
            [float(row[key]) / unit for row in mine] for key in ("value", "low", "high")
        )
        axes.errorbar(
            x, y, yerr=whiskers(y, low, high), fmt="o", color=BLUE, capsize=3, markersize=5
        )
        at_0, per_one = (float(mine[0][name]) / unit for name in ("at_0", "per_one"))
        axes.plot((0, x[-1]), (at_0, at_0 + per_one * x[-1]), color=GREY, zorder=0)
        quantity = "peak memory, MB" if memory else "time, ms"
        letter = what.removeprefix("memory, ")
        style(
            axes,
            title=f"{quantity}\n(within {100 * off[what]:.0f} %)",
            x=f"{letter}, {_MEANS[letter]}",
        )
        axes.set_xlim(0, 1.12 * x[-1])
        axes.set_ylim(0, 1.15 * max(y))
        axes.set_xticks(x[-2:])
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    save(figure, path)


class Line(NamedTuple):
    """A straight line, and the largest relative distance of a value from it."""

    at_0: float
    per_one: float
    off: float


def fitted_line(sizes: Sequence[float], values: Sequence[float]) -> Line:
    """Fit value = at_0 + per_one * size by least squares of the relative errors."""
    per_one, at_0 = numpy.polyfit(sizes, values, 1, w=[1 / value for value in values])
    off = max(abs(at_0 + per_one * x - y) / y for x, y in zip(sizes, values, strict=True))
    return Line(float(at_0), float(per_one), float(off))
