"""The figure of `python -m bench speed`: time and peak memory of each way to make the loss."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from str_kernels.integrations.figures import (
    BLACK,
    BLUE,
    GREY,
    QUIET,
    SMALL,
    new_figure,
    save,
    style,
)

from .memory.child import FLOOR
from .results import newest, read_rows
from .steps.providers import ALL_OPTIONS, EAGER

_BEST = "ours (torch)"
# Rows that the table has and that would only add bars: variants of ours, and TRL's loss, which has
# no kernel for a CPU, so that its time there says nothing of it.
_LEFT_OUT = (", no penalty", ALL_OPTIONS)
_NO_KERNEL = "TRL"
_BY_HAND = "by hand (eager)"


def last_run(
    rows: Sequence[Mapping[str, str]], head: str, dtype: str, train_head: bool
) -> list[dict[str, str]]:
    """Return the rows of the newest run with this head and dtype.

    Raises:
        ValueError: there is none.
    """
    wanted = {"head": head, "dtype": dtype, "train_head": str(train_head)}
    mine = [row for row in rows if all(row[k] == v for k, v in wanted.items())]
    if not mine:
        kind = "trainable" if train_head else "frozen"
        raise ValueError(
            f"no saved run with a {kind} head {head!r} in {dtype}: python -m bench speed --save"
        )
    return newest(mine)


def saved_runs(
    results: Path, head: str, dtype: str, train_head: bool
) -> list[list[dict[str, str]]]:
    """Return the newest run of each file of `speed` in a folder, the main one first.

    The other file has CCE, in a run on a machine of its own.

    Raises:
        ValueError: speed.csv has none with this head and dtype.
        OSError: there is no speed.csv.
    """
    runs = [last_run(read_rows(results / "speed.csv"), head, dtype, train_head)]
    beside = results / "speed_one_thread.csv"
    if beside.exists():
        with contextlib.suppress(ValueError):
            runs.append(last_run(read_rows(beside), head, dtype, train_head))
    return runs


def draw(runs: Sequence[Sequence[Mapping[str, str]]], path: Path) -> None:
    """Draw medians and quartiles of the time, and peak memory, of each way; a PNG.

    Args:
        runs: of one head and dtype, each on a machine of its own; a pair of panels for each.
        path: the PNG file.
    """
    shown = [[row for row in run if _is_shown(row)] for run in runs]
    counts = [len(rows) for rows in shown]
    figure = new_figure(1.5 + sum(0.75 + 0.27 * n for n in counts), _title(runs), _caption(runs))
    grid = figure.subplots(len(runs), 2, squeeze=False, sharey="row", height_ratios=counts)
    for run, rows, (time, memory) in zip(runs, shown, grid, strict=True):
        names = [row["provider"] for row in rows]
        colours = [BLUE if name.startswith("ours") else GREY for name in names]
        _draw_times(time, rows, colours)
        for row in run:
            if row["provider"] == FLOOR and row["status"] == "timed":
                time.axvline(float(row["median_ms"]), color=BLACK, linestyle=":", linewidth=1)
        what = f"ms of a forward and backward, {run[0]['rounds']} rounds"
        style(time, title=run[0]["device"], x=what, grid="x")
        _draw_peaks(memory, rows, colours)
        style(memory, title="peak memory", x="MB above the inputs", grid="x")
        time.set_yticks(
            range(len(rows)), [_BY_HAND if name == EAGER.name else name for name in names]
        )
        time.set_ylim(len(rows) - 0.5, -0.5)
        for axes in (time, memory):
            axes.margins(x=0.24)  # for the numbers beside the longest bar
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    save(figure, path)


def _is_shown(row: Mapping[str, str]) -> bool:
    name = row["provider"]
    absent = row["status"] != "timed" or name in (FLOOR, _NO_KERNEL)
    return not absent and not name.endswith(_LEFT_OUT)


def _draw_times(axes: Any, rows: Sequence[Mapping[str, str]], colours: Sequence[str]) -> None:
    middle, low, high = (
        [float(row[name]) for row in rows] for name in ("median_ms", "low_ms", "high_ms")
    )
    places = range(len(rows))
    spread = [
        [value - bound for value, bound in zip(middle, low, strict=True)],
        [bound - value for value, bound in zip(middle, high, strict=True)],
    ]
    axes.barh(places, middle, 0.62, color=colours)
    axes.errorbar(middle, places, xerr=spread, fmt="none", ecolor=BLACK, elinewidth=1, capsize=2.5)
    for place, row, bound in zip(places, rows, high, strict=True):
        _write_beside(axes, bound, place, f"{float(row['against_products']):.2f} x")


def _draw_peaks(axes: Any, rows: Sequence[Mapping[str, str]], colours: Sequence[str]) -> None:
    peaks = [float(row["peak_bytes"] or 0) / 1e6 for row in rows]
    axes.barh(range(len(rows)), peaks, 0.62, color=colours)
    for place, (row, peak) in enumerate(zip(rows, peaks, strict=True)):
        text = f"{peak:,.0f}" if row["peak_bytes"] else "not measured"
        _write_beside(axes, peak, place, text)


def _write_beside(axes: Any, x: float, y: float, text: str) -> None:
    axes.annotate(
        text, (x, y), (5, 0), textcoords="offset points", va="center", fontsize=SMALL, color=QUIET
    )


def _title(runs: Sequence[Sequence[Mapping[str, str]]]) -> str:
    """Say what ours takes beside the loss by hand, where both were measured."""
    peaks, ratios = [], []
    for run in runs:
        timed = {row["provider"]: row for row in run if row["status"] == "timed"}
        if _BEST in timed and EAGER.name in timed:
            ratios.append(100 * float(timed[_BEST]["against_eager"]))
            both = [timed[name]["peak_bytes"] for name in (_BEST, EAGER.name)]
            peaks += [[float(peak) / 1e6 for peak in both]] if all(both) else []
    if not peaks:
        return "Time and peak memory of each way to make the loss"
    low, high = f"{min(ratios):.0f}", f"{max(ratios):.0f}"
    return (
        f"Ours takes {peaks[0][0]:,.0f} MB where the loss by hand takes {peaks[0][1]:,.0f}, and "
        f"{low if low == high else f'{low} to {high}'} % of its time"
    )


def _caption(runs: Sequence[Sequence[Mapping[str, str]]]) -> str:
    one = runs[0][0]
    head = "trainable" if one["train_head"] == "True" else "frozen"
    left_out = ""
    if any(
        row["provider"] == _NO_KERNEL and row["status"] == "timed" for run in runs for row in run
    ):
        left_out = f" {_NO_KERNEL}'s loss has no kernel for a CPU and is left out."
    versions = dict.fromkeys(f"torch {run[0]['torch']}" for run in runs)
    return (
        f"Head of {one['head']}, {head}, N = {int(one['N']):,} tokens, D = {int(one['D']):,}, "
        f"V = {int(one['V']):,}, K = {one['K']} safety tokens, {one['dtype']}; "
        f"{', '.join(versions)}. Time: all ways in turn in every round; median, whiskers the "
        f"quartiles, beside it the median ratio to the bare products (dotted), which every exact "
        f"way must make. Memory: each in a process of its own.{left_out}"
    )
