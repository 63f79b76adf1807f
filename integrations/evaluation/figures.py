"""The figures of an evaluation: drift along an answer, refusals of several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from ..figures import (
    BLUE,
    ORANGE,
    SERIES,
    Share,
    draw_shares,
    figure_label,
    legend,
    new_figure,
    save,
    style,
)

_MARKERS = "os^Dvx"
_NAMED = 2  # a title has room for the names of this many runs


def draw_drift(lines: Mapping[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """Draw the rms drift of the safety logits over the positions of an answer.

    Args:
        lines: for each label its positions, as dicts with position, prompts (number of answers that
            have this position) and rms (None if it is not finite, which leaves a gap).
        path: the PNG file to write.
    """
    known = [
        (one["rms"], label, one["position"])
        for label, found in lines.items()
        for one in found
        if one["rms"] is not None
    ]
    title = "How far the safety logits moved from the reference"
    if known:
        rms, label, position = max(known)
        title = (
            f"The safety logits moved most at token {position}: {rms:.3g} logits rms, "
            f"{figure_label(label)}"
        )
    figure = new_figure(
        3.4,
        title,
        "Distance from the reference on the reference's own greedy answers; the root of the mean "
        "square over n prompts and the safety tokens. Later tokens: of the answers so long.",
    )
    axes = figure.subplots()
    for number, (label, found) in enumerate(lines.items()):
        count = max((one["prompts"] for one in found), default=0)
        axes.plot(
            [one["position"] for one in found],
            [float("nan") if one["rms"] is None else one["rms"] for one in found],
            marker=_MARKERS[number % len(_MARKERS)],
            color=SERIES[number % len(SERIES)],
            label=f"{figure_label(label)} (n = {count})",
        )
    style(
        axes,
        x="token of the reference's answer (1 is where it begins)",
        y="rms drift (logits)",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    legend(axes)
    save(figure, path)


def draw_refusals(
    rules: Mapping[str, Sequence[Mapping[str, Any]]], names: Sequence[str], path: Path
) -> None:
    """Draw the refusals of every run with 95 % Wilson intervals, a row of panels for each rule.

    Args:
        rules: for each rule's name one entry per run: {"harmful": counts, "harmless": counts},
            with refusal, total and interval.
        names: of the runs, in the same order.
        path: the PNG file to write.
    """
    labels = [figure_label(name) for name in names]
    figure = new_figure(
        1.5 + len(rules) * (0.8 + 0.34 * len(names)),
        _refusals_title(rules, labels),
        "Counts of prompts and 95 % Wilson intervals; the same prompts were asked in every run.",
    )
    rows = figure.subplots(len(rules), 2, squeeze=False, sharey=True)
    for row, (rule, runs) in zip(rows, rules.items(), strict=True):
        for axes, kind, wish, colour in (
            (row[0], "harmful", "more is better", BLUE),
            (row[1], "harmless", "fewer is better", ORANGE),
        ):
            counts = [run[kind] for run in runs]
            shares = [Share(one["refusal"], one["total"], one["interval"]) for one in counts]
            title = f"{kind} refused ({wish}),\nby rule {figure_label(rule)}"
            draw_shares(axes, labels, shares, [colour] * len(shares), title=title)
    save(figure, path)


def _refusals_title(rules: Mapping[str, Sequence[Mapping[str, Any]]], labels: Sequence[str]) -> str:
    """Say how many harmful prompts the runs refuse, by the first rule."""
    rule, runs = next(iter(rules.items()))
    percents = [100 * run["harmful"]["refusal"] / max(run["harmful"]["total"], 1) for run in runs]
    if len(runs) <= _NAMED:
        each = [f"{label} {part:.0f} %" for label, part in zip(labels, percents, strict=True)]
        said = ", ".join(each)
    else:
        said = f"{min(percents):.0f} to {max(percents):.0f} % in the {len(runs)} runs"
    return f"Harmful prompts refused, by rule {figure_label(rule)}: {said}"
