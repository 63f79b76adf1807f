"""The figure and table of docs/benchmarks.md: the last saved run of `python -m bench speed`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from str_kernels.atomic import replacing

from .memory.child import FLOOR
from .steps.providers import EAGER

_OURS, _OTHERS, _NOTHING = "#1b6ca8", "#b8b8b8", "#e3c16f"
_LONGEST = 2.5  # bars of time are cut at this many times eager, or one outlier hides the others


def last_run(
    rows: Sequence[Mapping[str, str]], head: str, dtype: str, train_head: bool
) -> list[dict[str, str]]:
    """Return the rows of the newest run with this head and dtype.

    Raises:
        ValueError: there is none.
    """
    wanted = {"head": head, "dtype": dtype, "train_head": str(train_head)}
    mine = [dict(row) for row in rows if all(row[k] == v for k, v in wanted.items())]
    if not mine:
        kind = "trainable" if train_head else "frozen"
        raise ValueError(
            f"no saved run with a {kind} head {head!r} in {dtype}: python -m bench speed --save"
        )
    newest = max(row["date"] for row in mine)
    return [row for row in mine if row["date"] == newest]


def draw(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Draw bars of time, in bare products, and of peak memory; a PNG."""
    timed = [row for row in rows if row["status"] == "timed"]
    figure = Figure(figsize=(9, 0.9 + 0.32 * len(timed)), layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True)
    names = [row["provider"] for row in timed]
    colours = [_colour(name) for name in names]
    ratios = [float(row["against_products"]) for row in timed]
    by_hand = [r for name, r in zip(names, ratios, strict=True) if name == EAGER.name]
    limit = _LONGEST * max(by_hand or ratios)
    bars = time.barh(names, [min(ratio, limit) for ratio in ratios], color=colours)
    labels = [f"{ratio:.2f} x{' (cut)' if ratio > limit else ''}" for ratio in ratios]
    time.bar_label(bars, labels, padding=3, fontsize=9)
    time.axvline(1.0, color="black", linewidth=0.8)
    time.set_xlabel("time of a forward and backward, in bare products")
    time.invert_yaxis()
    peaks = [float(row["peak_bytes"] or 0) / 1e6 for row in timed]
    labels = [
        f"{peak:,.0f}" if row["peak_bytes"] else "" for peak, row in zip(peaks, timed, strict=True)
    ]
    bars = memory.barh(names, peaks, color=colours)
    memory.bar_label(bars, labels, padding=3, fontsize=9)
    memory.set_xlabel("peak memory above the inputs, MB")
    for axes in (time, memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.2)
    one = timed[0]
    head = "trainable" if one["train_head"] == "True" else "frozen"
    figure.suptitle(
        f"{one['head']}: N {one['N']}, D {one['D']}, V {one['V']}, K {one['K']}, {one['dtype']}, "
        f"{head} head; {one['device']}, torch {one['torch']}",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def _colour(name: str) -> str:
    if name == FLOOR:
        return _NOTHING
    return _OURS if name.startswith("ours") else _OTHERS
