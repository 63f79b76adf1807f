"""How time grows with N, V and D, and memory with N: one figure, and the exponents fitted to it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from str_kernels.atomic import replacing

from .child import peak_in_child
from .heads import HeadShape
from .inputs import draw_inputs
from .memory import OURS
from .providers import providers
from .results import Row, origin
from .speed import step_of
from .timing import fitted_exponent, quartiles, rounds

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
    "above the inputs in a fresh process on the CPU. Exponent b: least squares for a size^b."
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
        and the exponent of all sizes of its kind.
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
        rows += _rows(base, "memory, N", every, [(of(tokens=n),) * 3 for n in every])
    return rows


def _rows(
    base: Row, what: str, sizes: Sequence[int], values: Sequence[tuple[float, float, float]]
) -> list[Row]:
    exponent = fitted_exponent(sizes, [middle for _, middle, _ in values])
    return [
        base
        | {
            "grows": what,
            "size": size,
            "value": middle,
            "low": low,
            "high": high,
            "unit": "bytes" if what.startswith("memory") else "ms",
            "exponent": exponent,
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
        slope = mine[0]["exponent"]
        centre = fitted_centre(x, y, slope)
        axes.plot(x, [centre * size**slope for size in x], color=_FIT, linewidth=1, zorder=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for of in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            of(StrMethodFormatter("{x:g}"))  # not 6 x 10^1
        axes.set_title(f"exponent {slope:.2f}", fontsize=10)
        axes.set_xlabel(what.removeprefix("memory, "))
        axes.set_ylabel("peak memory, MB" if memory else "time, ms")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def fitted_centre(sizes: Sequence[float], values: Sequence[float], exponent: float) -> float:
    """Return a of the least-squares fit values = a sizes^exponent in logarithms."""
    product = 1.0
    for size, value in zip(sizes, values, strict=True):
        product *= (value / size**exponent) ** (1 / len(sizes))
    return product
