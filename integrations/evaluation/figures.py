"""The pictures of an evaluation: drift along an answer, refusals of several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...evals import printable
from ..figures import COLOURS, draw_error_bars, save

_MARKERS = "os^Dvx"
_LABEL_CHARACTERS = 24


def draw_drift(lines: Mapping[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """Draw the rms drift of the safety logits over the positions of an answer.

    Args:
        lines: a label and its positions: dicts with position and rms (None where it is not
            finite, which leaves a gap).
        path: the PNG file.
    """
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, (label, found) in enumerate(lines.items()):
        axes.plot(
            [one["position"] for one in found],
            [float("nan") if one["rms"] is None else one["rms"] for one in found],
            marker=_MARKERS[number % len(_MARKERS)],
            color=COLOURS[(number + 2) % len(COLOURS)],
            label=figure_label(label),
        )
    axes.set_xlabel("token of the reference's answer (1 is where it begins)")
    axes.set_ylabel("rms drift (logits)")
    axes.set_title("how far the safety logits moved from the reference", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    save(figure, path)


def draw_refusals(
    rules: Mapping[str, Sequence[Mapping[str, Any]]], names: Sequence[str], path: Path
) -> None:
    """Draw the refusals of every run with 95 % Wilson intervals, a panel for each rule.

    Args:
        rules: a rule's name and its counts, one entry a run: {"harmful": counts, "harmless":
            counts} with refusal, total and interval.
        names: of the runs, in the same order.
        path: the PNG file.
    """
    width = max(4.5, 1.4 * len(names) + 1.5)
    figure = Figure(figsize=(width * len(rules), 3.8), layout="constrained")
    panels = figure.subplots(1, len(rules), squeeze=False)[0]
    for axes, (rule, runs) in zip(panels, rules.items(), strict=True):
        for offset, kind, label, colour in (
            (-0.19, "harmful", "harmful (more is better)", COLOURS[2]),
            (0.19, "harmless", "harmless (fewer is better)", COLOURS[3]),
        ):
            places = [place + offset for place in range(len(runs))]
            shares = [100 * run[kind]["refusal"] / max(run[kind]["total"], 1) for run in runs]
            axes.bar(places, shares, 0.38, color=colour, label=label)
            draw_error_bars(axes, places, shares, [run[kind]["interval"] for run in runs])
        axes.set_title(f'refused, rule "{figure_label(rule)}" (%, 95 % Wilson)', fontsize=10)
        axes.set_ylim(0, 118)  # room for the legend
        axes.set_yticks(range(0, 101, 20))
        axes.legend(fontsize=8, loc="upper center", ncols=2, frameon=False)
        labels = [figure_label(name) for name in names]
        axes.set_xticks(range(len(names)), labels, fontsize=8)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    save(figure, path)


def figure_label(text: str) -> str:
    """Return a name as matplotlib shows it literally: short, and without its mathematics."""
    # what the font has no glyph for would be an empty box and a warning
    plain = printable(text).encode("latin-1", "backslashreplace").decode("latin-1")
    if len(plain) > _LABEL_CHARACTERS:
        plain = plain[: _LABEL_CHARACTERS - 3] + "..."
    plain = plain.replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain  # matplotlib hides labels that do
