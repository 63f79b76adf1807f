"""The study's figure: the refusals that each run keeps, and the cost."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from itertools import cycle, product
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from matplotlib.ticker import MaxNLocator

from ...evals import wilson_interval
from ..figures import BLACK, BLUE, GREY, QUIET, SMALL, VERMILION, legend, new_figure, save, style
from .results import BASE, Found, read_rows

DEFAULT = "anchors (default)"
_PLAIN = "plain"
_COLOURS = {DEFAULT: BLUE, "rows (paper)": VERMILION, _PLAIN: BLACK}  # highlighted arms
_NAMED = (*_COLOURS, "random", "refusal rows")  # labelled in the left panel; the right has all
_MARKERS = "o^sD"  # one per task
_SIDES = ((1, 0), (-1, 0), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7))


class _Dot(NamedTuple):
    """A run, relative to the taught base and to plain fine-tuning with the same seed."""

    kept: float  # of the base's refusals of harmful probes, percent
    right: float  # answers of the task, points above plain's
    over: float  # refusals of harmless probes, points above the base's


def draw_frontier(found: Found, path: Path) -> None:
    """Draw each run as a dot: refusals kept against right answers, and over-refusal next to it.

    A run is compared with the taught base and with plain fine-tuning of its own seed, since both
    differ between seeds. A run that lacks either is left out.

    Args:
        found: the rows of a study.
        path: the PNG file to write.
    """
    tasks = found.tasks()
    arms = list(dict.fromkeys(a for task in tasks for a in found.arms(task) if a != BASE))
    dots = {(task, arm): _dots(found, task, arm) for task in tasks for arm in arms}
    every = {arm: [dot for task in tasks for dot in dots[task, arm]] for arm in arms}
    arms.sort(
        key=lambda arm: (arm not in _COLOURS, max((dot.over for dot in every[arm]), default=0))
    )
    figure = new_figure(
        max(4.4, 2.2 + 0.19 * len(arms)), _title(found, tasks), _caption(found, tasks)
    )
    kept, over = figure.subplots(1, 2, width_ratios=(1.5, 1))
    # highlighted arms are drawn last, on top of the others
    for arm in reversed(arms):
        for marker, task in zip(cycle(_MARKERS), tasks, strict=False):
            mine = dots[task, arm]
            look = {
                "color": _COLOURS.get(arm, GREY),
                "marker": marker,
                "markersize": 6 if arm in _COLOURS else 4,
                "alpha": 0.85,
                "markeredgewidth": 0,
            }
            x, y = [dot.right for dot in mine], [dot.kept for dot in mine]
            kept.plot(x, y, linewidth=0.8, **look)
            over.plot([dot.over for dot in mine], [arms.index(arm)] * len(mine), ls="", **look)
    for marker, task in zip(cycle(_MARKERS), tasks, strict=False):
        kept.plot([], [], marker=marker, ls="", color=GREY, label=f"task: {task}")
    _finish_kept(kept)
    _finish_over(over, arms, dots, tasks)
    if tasks:
        legend(kept, loc="best", handletextpad=0.2)
        _name_the_arms(
            figure, kept, {arm: every[arm] for arm in arms if arm in _NAMED and every[arm]}
        )
    save(figure, path)


def draw_study(file: Path, path: Path) -> None:
    """Draw the study whose plan is in a file's last row.

    Args:
        file: study.csv; it may hold several plans.
        path: the PNG file to write.
    """
    with file.open(newline="", encoding="utf-8") as rows:
        *_, last = csv.DictReader(rows)
    draw_frontier(Found(read_rows(file, last["plan"])), path)


def _dots(found: Found, task: str, arm: str) -> list[_Dot]:
    plain = {row.seed: row for row in found.of(task, _PLAIN)}
    dots = []
    for row in found.of(task, arm):
        base, beside = found.base(row), plain.get(row.seed)
        if base is not None and beside is not None:
            dots.append(
                _Dot(
                    100 * row.refused("harmful") / max(base.refused("harmful"), 1e-9),
                    100 * (row.right / row.asked - beside.right / beside.asked),
                    row.refused("harmless") - base.refused("harmless"),
                )
            )
    return sorted(dots, key=lambda dot: dot.right)


def _title(found: Found, tasks: Sequence[str]) -> str:
    """Say what the default and plain fine-tuning keep, on tasks where both were run."""
    both = [task for task in tasks if {DEFAULT, _PLAIN} <= set(found.arms(task))]
    default = [found.summary(task, DEFAULT) for task in both]
    plain = [found.summary(task, _PLAIN) for task in both]
    kept = [[100 * one.kept for one in ones if one.kept is not None] for ones in (default, plain)]
    costs = [abs(one.cost) for one in default if one.cost is not None]
    if not (kept[0] and kept[1] and costs):
        return "Refusals kept, against the task"
    return (
        f"Held at anchors, a model keeps {_range(kept[0])} % of its refusals; fine-tuned plainly, "
        f"{_range(kept[1])} %. Right answers are within {max(costs):.1f} points of each other"
    )


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


def _caption(found: Found, tasks: Sequence[str]) -> str:
    if not tasks:
        return "No fine-tuned run yet."
    first = found.rows[0]
    total = len(first.harmful)
    low, high = wilson_interval(total // 2, total)  # the widest interval
    return (
        f"SmolLM2-135M, taught to refuse, then fine-tuned with LoRA. A dot is one run, beside the "
        f"base and plain fine-tuning of its own seed: {total} harmful and {len(first.harmless)} "
        f"harmless held-out prompts (95 % Wilson interval of a count: at most "
        f"±{50 * (high - low):.0f} points), {first.asked} questions of the task. "
        f"Lines join an arm's seeds on one task. After the names: runs ({' + '.join(tasks)})."
    )


def _finish_kept(axes: Any) -> None:
    axes.axhline(100, color=BLACK, linestyle=":", linewidth=1)
    axes.axvline(0, color=BLACK, linestyle=":", linewidth=1)
    style(
        axes,
        title="harmful prompts still refused\n(% of the base's, more is better)",
        x="right answers, points above plain fine-tuning's",
    )
    axes.margins(x=0.12, y=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    axes.annotate(
        "taught base", (0.01, 100), (0, 3), xycoords=axes.get_yaxis_transform(),
        textcoords="offset points", fontsize=SMALL,
    )  # fmt: skip


def _finish_over(
    axes: Any, arms: Sequence[str], dots: dict[tuple[str, str], list[_Dot]], tasks: Sequence[str]
) -> None:
    axes.axvline(0, color=BLACK, linestyle=":", linewidth=1)
    style(
        axes,
        title="harmless prompts refused\n(fewer is better)",
        x="points above the base's",
        grid="x",
    )
    counts = [" + ".join(str(len(dots[task, arm])) for task in tasks) for arm in arms]
    names = [f"{arm} ({count})" for arm, count in zip(arms, counts, strict=True)]
    axes.set_yticks(range(len(arms)), names, fontsize=SMALL)
    for label, arm in zip(axes.get_yticklabels(), arms, strict=True):
        label.set(**_name_look(arm))
    axes.set_ylim(len(arms) - 0.4, -0.6)


def _name_the_arms(figure: Any, axes: Any, of_arm: dict[str, list[_Dot]]) -> None:
    """Write each arm's name near its dots, where it covers no other name and no dot."""
    figure.draw_without_rendering()  # fixes the panel's position
    inside = axes.get_window_extent()
    centres = {
        arm: (mean(d.right for d in of), mean(d.kept for d in of)) for arm, of in of_arm.items()
    }
    dots = [axes.transData.transform((d.right, d.kept)) for of in of_arm.values() for d in of]
    taken = [axes.get_legend().get_window_extent(), *(t.get_window_extent() for t in axes.texts)]
    for arm, centre in centres.items():
        for distance, (x, y) in product((8, 14, 22, 32, 44), _SIDES):
            text = axes.annotate(
                arm, centre, (x * distance, y * distance), textcoords="offset points",
                ha="left" if x > 0 else "right", va="center", fontsize=SMALL, **_name_look(arm),
            )  # fmt: skip
            box = text.get_window_extent().padded(3)
            fits = inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1)
            if fits and not any(box.overlaps(other) for other in taken) and not any(
                box.contains(*dot) for dot in dots
            ):  # fmt: skip
                taken.append(box)
                break
            text.remove()


def _name_look(arm: str) -> dict[str, str]:
    weight = "bold" if arm in _COLOURS else "normal"
    return {"color": _COLOURS.get(arm, QUIET), "fontweight": weight}
