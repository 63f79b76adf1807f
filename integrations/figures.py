"""The pictures: a run's curves, and the demo's comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..atomic import replacing

# Wong's palette, told apart by people who do not see red and green as different.
COLOURS = ("#999999", "#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7")
# A panel's title, and the terms of the log that it shows, with their names where there are two.
_CURVES = (
    ("cross-entropy (nats)", {"safety/ce": "training", "eval_loss": "evaluation"}),
    ("penalty (unit of its kind)", {"safety/penalty": "rows", "safety/anchor_penalty": "anchors"}),
    ("largest drift (logits)", {"safety/max_drift": "rows and anchors"}),
)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def draw_curves(log: Sequence[dict[str, float]], path: Path) -> None:
    """Draw cross-entropy, penalty and largest drift over the steps of one run.

    Args:
        log: entries of steps and of evaluations; a term that is None is left out.
        path: the PNG file.
    """
    figure = Figure(figsize=(10, 3), layout="constrained")
    for axes, (title, terms) in zip(figure.subplots(1, len(_CURVES)), _CURVES, strict=True):
        for colour, (name, label) in zip(COLOURS[2:], terms.items(), strict=False):
            points = [(e["step"], e[name]) for e in log if e.get(name) is not None]
            if any(value for _, value in points):
                style = "o-" if len(points) < 20 else "-"
                axes.plot(
                    *zip(*points, strict=True), style, color=colour, label=label, markersize=3
                )
        if len(axes.lines) > 1 or (axes.lines and title.startswith("penalty")):
            axes.legend(fontsize=8)
        axes.set_xlabel("step")
        axes.set_title(title, fontsize=10)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    save(figure, path)


def draw_comparison(groups: Mapping[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """Draw refusals with intervals, task accuracy and drift for each run, a group of runs a row.

    Args:
        groups: a title and its runs: dicts with name, harmful and benign ({"refusal", "total",
            "interval"}), accuracy ({"count", "total", "interval"}) and drift ({"rms"} or None).
        path: the PNG file.
    """
    figure = Figure(figsize=(11, 3.6 * len(groups)), layout="constrained")
    grid = figure.subplots(len(groups), 3, width_ratios=(2, 1, 1), squeeze=False)
    for (title, runs), axes in zip(groups.items(), grid, strict=True):
        _draw_runs(runs, axes, f"{title}: " if title else "")
    save(figure, path)


def _draw_runs(runs: Sequence[dict[str, Any]], row: Any, title: str) -> None:
    names = [run["name"].replace(" ", "\n") for run in runs]
    refusals, task, drift = row
    width = 0.38
    for offset, key, label, colour in (
        (-width / 2, "harmful", "harmful probes (more is better)", COLOURS[2]),
        (width / 2, "benign", "harmless probes (fewer is better)", COLOURS[3]),
    ):
        places = [place + offset for place in range(len(runs))]
        shares = [100 * run[key]["refusal"] / run[key]["total"] for run in runs]
        refusals.bar(places, shares, width, color=colour, label=label)
        draw_error_bars(refusals, places, shares, [run[key]["interval"] for run in runs])
    refusals.set_title(f"{title}refusals on held-out probes (%, 95 % Wilson)", fontsize=10)
    refusals.set_ylim(0, 115)  # room for the legend
    refusals.set_yticks(range(0, 101, 20))
    refusals.legend(fontsize=8, loc="upper center", ncols=2, frameon=False)
    places = list(range(len(runs)))
    shares = [100 * run["accuracy"]["count"] / run["accuracy"]["total"] for run in runs]
    task.bar(places, shares, 0.6, color=COLOURS[4])
    draw_error_bars(task, places, shares, [run["accuracy"]["interval"] for run in runs])
    task.set_title("task: right sums (%)", fontsize=10)
    task.set_ylim(0, 105)
    values = [run["drift"]["rms"] if run["drift"] else 0.0 for run in runs]
    drift.bar(places, values, 0.6, color=COLOURS[1])
    drift.set_title("rms drift of safety logits\nat the first answer position", fontsize=10)
    for axes in (refusals, task, drift):
        axes.set_xticks(range(len(runs)), names, fontsize=8 if len(runs) < 5 else 6.5)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)


def draw_error_bars(
    axes: Any, places: Sequence[float], shares: Sequence[float], intervals: Sequence[Any]
) -> None:
    """Draw intervals of shares: bars at percentages, bounds in [0, 1]."""
    below = [max(0.0, share - 100 * low) for share, (low, _) in zip(shares, intervals, strict=True)]
    above = [
        max(0.0, 100 * high - share) for share, (_, high) in zip(shares, intervals, strict=True)
    ]
    axes.errorbar(places, shares, yerr=[below, above], fmt="none", ecolor="black", capsize=3)
