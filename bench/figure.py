"""The figure of `python -m bench speed`: time and peak memory of each way to compute the loss."""

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
    draw_bars,
    new_figure,
    save,
    style,
    write_beside,
)

from .memory.child import FLOOR
from .results import newest, read_rows
from .steps.providers import ALL_OPTIONS, EAGER

_BEST = "ours (torch)"
_LEFT_OUT = (", no penalty", ALL_OPTIONS)  # in the table; in the figure they would only add bars
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
    """Return the newest run in each of the files of `speed` in a folder, the main one first.

    The other file has CCE, from a run on a different machine.

    Raises:
        ValueError: speed.csv has no run with this head and dtype.
        OSError: there is no speed.csv.
    """
    runs = [last_run(read_rows(results / "speed.csv"), head, dtype, train_head)]
    beside = results / "speed_one_thread.csv"
    if beside.exists():
        with contextlib.suppress(ValueError):
            runs.append(last_run(read_rows(beside), head, dtype, train_head))
    return runs


def draw(runs: Sequence[Sequence[Mapping[str, str]]], path: Path) -> None:
    """Draw each provider's time (median and quartiles) and peak memory as a PNG.

    Args:
        runs: of one head and dtype, each from a different machine; a pair of panels for each.
        path: the PNG file.
    """
    shown = [[row for row in run if _is_shown(row)] for run in runs]
    counts = [max(1, len(rows)) for rows in shown]
    figure = new_figure(1.5 + sum(0.75 + 0.27 * n for n in counts), _title(runs), _caption(runs))
    grid = figure.subplots(len(runs), 2, squeeze=False, sharey="row", height_ratios=counts)
    for run, rows, (time, memory) in zip(runs, shown, grid, strict=True):
        providers = [row["provider"] for row in rows]
        colours = [BLUE if name.startswith("ours") else GREY for name in providers]
        names = [_BY_HAND if name == EAGER.name else name for name in providers]
        _draw_times(time, rows, names, colours)
        for row in run:
            if row["provider"] == FLOOR and row["status"] == "timed":
                time.axvline(float(row["median_ms"]), color=BLACK, linestyle=":", linewidth=1)
        what = f"ms of a forward and backward, {run[0]['rounds']} rounds"
        style(time, title=run[0]["device"], x=what, grid="x")
        _draw_peaks(memory, rows, names, colours)
        style(memory, title="peak memory", x="MB above the inputs", grid="x")
        for axes in (time, memory):
            axes.margins(x=0.24)  # for the numbers beside the longest bar
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    save(figure, path)


def _is_shown(row: Mapping[str, str]) -> bool:
    name = row["provider"]
    absent = row["status"] != "timed" or name == FLOOR or _says_nothing(row)
    return not absent and not name.endswith(_LEFT_OUT)


def _says_nothing(row: Mapping[str, str]) -> bool:
    """Tell whether a row's loss ran without its kernel, as TRL's does on a CPU."""
    return row["provider"] == "TRL" and "thread" in row["device"]  # as a CPU is named in `results`


def _draw_times(
    axes: Any, rows: Sequence[Mapping[str, str]], names: Sequence[str], colours: Sequence[str]
) -> None:
    values, low, high = (
        [float(row[name]) for row in rows] for name in ("median_ms", "low_ms", "high_ms")
    )
    draw_bars(axes, names, values, colours, (low, high))
    write_beside(axes, high, [f"{float(row['against_products']):.2f} x" for row in rows])


def _draw_peaks(
    axes: Any, rows: Sequence[Mapping[str, str]], names: Sequence[str], colours: Sequence[str]
) -> None:
    peaks = [float(row["peak_bytes"] or 0) / 1e6 for row in rows]
    draw_bars(axes, names, peaks, colours)
    texts = [
        f"{peak:,.0f}" if row["peak_bytes"] else "not measured"
        for row, peak in zip(rows, peaks, strict=True)
    ]
    write_beside(axes, peaks, texts)


def _title(runs: Sequence[Sequence[Mapping[str, str]]]) -> str:
    """Compare ours with the loss by hand, if both were measured."""
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
    if any(_says_nothing(row) and row["status"] == "timed" for run in runs for row in run):
        left_out = " TRL's loss has no kernel for a CPU and is left out."
    versions = dict.fromkeys(f"torch {run[0]['torch']}" for run in runs)
    return (
        f"Head of {one['head']}, {head}, N = {int(one['N']):,} tokens, D = {int(one['D']):,}, "
        f"V = {int(one['V']):,}, K = {one['K']} safety tokens, {one['dtype']}; "
        f"{', '.join(versions)}. Time: all ways in turn in every round; median, whiskers the "
        f"quartiles, beside it the median ratio to the bare products (dotted), which every exact "
        f"way must make. Memory: on a CPU each in a process of its own.{left_out}"
    )
