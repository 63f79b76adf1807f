"""The look that all figures share: a title that is a sentence, a caption that says of what."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ..atomic import replacing
from ..evals import printable

_WIDTH = 8.0  # inches; a README shows them on some 800 pixels, so that 8 points are 11 pixels
_DPI = 200
# Wong's palette, told apart by people who do not see red and green as different. Where ways are
# compared, blue is ours, vermilion the paper's form or naive STR, and grey what is beside them.
BLUE, VERMILION, ORANGE = "#0072B2", "#D55E00", "#E69F00"
GREEN, PURPLE, SKY = "#009E73", "#CC79A7", "#56B4E9"
BLACK, GREY, PALE = "#222222", "#8A8A8A", "#CFCFCF"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY)  # of lines without such a meaning
QUIET, _GRID = "#555555", "#E4E4E4"
_TITLE, _TEXT, SMALL = 12.0, 9.0, 8.0  # points
_NAME = 24  # characters


@dataclass(frozen=True)
class Share:
    """A count of a total, and its interval as parts of 1."""

    count: int
    total: int
    interval: Sequence[float]

    @property
    def percent(self) -> float:
        """Return the part in percent; 0 of nothing is 0."""
        return 100 * self.count / max(self.total, 1)


def new_figure(height: float, title: str, caption: str) -> Figure:
    """Return a figure with a title and a caption, both wrapped, and no panel yet.

    Args:
        height: inches.
        title: the one thing that the figure says.
        caption: of what: model, machine, how many, and what the whiskers are.
    """
    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.06)
    figure = Figure(figsize=(_WIDTH, height), layout=layout, facecolor="white")
    # DejaVu Sans has about so many characters an inch at these sizes
    text = _balanced(title, int(9.3 * _WIDTH))
    figure.suptitle(text, x=0.01, ha="left", fontsize=_TITLE, fontweight="bold", color=BLACK)
    text = textwrap.fill(caption, int(15.8 * _WIDTH), break_on_hyphens=False)
    figure.supxlabel(text, x=0.01, ha="left", fontsize=SMALL, color=QUIET)
    return figure


def _balanced(text: str, most: int) -> str:
    """Return text in as few lines as fit, about equally long: a last word alone looks lost."""
    lines = len(textwrap.wrap(text, most, break_on_hyphens=False))
    for width in range(most // 2, most):
        wrapped = textwrap.wrap(text, width, break_on_hyphens=False)
        if len(wrapped) == lines:
            return "\n".join(wrapped)
    return textwrap.fill(text, most, break_on_hyphens=False)


def style(axes: Any, *, title: str = "", x: str = "", y: str = "", grid: str = "both") -> None:
    """Give a panel its labels, and the look of all others.

    Args:
        axes: the panel.
        title: what is drawn, with its unit where an axis does not say it.
        x: quantity and unit.
        y: likewise.
        grid: "x", "y" or "both".
    """
    axes.set_facecolor("white")
    axes.set_title(title, fontsize=_TEXT + 0.5, loc="left", color=BLACK)
    axes.set_xlabel(x, fontsize=_TEXT)
    axes.set_ylabel(y, fontsize=_TEXT)
    axes.tick_params(labelsize=_TEXT, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def legend(axes: Any, **options: Any) -> None:
    """Name a panel's lines, inside it."""
    axes.legend(fontsize=SMALL + 0.5, frameon=False, **options)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG on white, whole or not at all; its folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=_DPI, facecolor="white", transparent=False)


def whiskers(
    values: Sequence[float], low: Sequence[float], high: Sequence[float]
) -> list[list[float]]:
    """Return how far bounds are below and above their values, as matplotlib wants it."""
    # a bound may be off its value by a rounding, on the wrong side
    below = [max(0.0, value - bound) for value, bound in zip(values, low, strict=True)]
    above = [max(0.0, bound - value) for value, bound in zip(values, high, strict=True)]
    return [below, above]


def draw_bars(
    axes: Any,
    names: Sequence[str],
    values: Sequence[float],
    colours: Sequence[str],
    bounds: tuple[Sequence[float], Sequence[float]] | None = None,
) -> None:
    """Draw a bar for each value, the first on top, with whiskers to its bounds.

    Args:
        axes: the panel.
        names: of the values.
        values: in the unit of the axis.
        colours: one for each.
        bounds: the lower and the upper ones; those that are the values themselves are not drawn.
    """
    places = range(len(values))
    axes.barh(places, values, 0.62, color=colours)
    spread = whiskers(values, *bounds) if bounds else []
    if any(map(any, spread)):
        axes.errorbar(
            values, places, xerr=spread, fmt="none", ecolor=BLACK, elinewidth=1, capsize=2.5
        )
    axes.set_yticks(places, names)
    axes.set_ylim(len(values) - 0.5, -0.5)


def write_beside(axes: Any, ends: Sequence[float], texts: Sequence[str]) -> None:
    """Write a text at the end of each bar."""
    for place, (end, text) in enumerate(zip(ends, texts, strict=True)):
        axes.annotate(
            text, (end, place), (5, 0), textcoords="offset points", va="center",
            fontsize=SMALL, color=QUIET,
        )  # fmt: skip


def draw_shares(
    axes: Any, names: Sequence[str], shares: Sequence[Share], colours: Sequence[str], *, title: str
) -> None:
    """Draw a bar for each share, in percent, with its interval and its counts.

    Args:
        axes: the panel.
        names: of the shares.
        shares: one for each.
        colours: likewise.
        title: of the panel.
    """
    low, high = ([100 * share.interval[end] for share in shares] for end in (0, 1))
    draw_bars(axes, names, [share.percent for share in shares], colours, (low, high))
    write_beside(axes, high, [f"{share.count}/{share.total}" for share in shares])
    style(axes, title=title, x="%", grid="x")
    axes.set_xlim(0, 135)  # room for the counts beside 100 %
    axes.set_xticks(range(0, 101, 25))


def figure_label(text: str) -> str:
    """Return a name as matplotlib shows it literally: short, and without its mathematics."""
    # what the font has no glyph for would be an empty box and a warning
    plain = printable(text).encode("latin-1", "backslashreplace").decode("latin-1")
    if len(plain) > _NAME:
        plain = plain[: _NAME - 3] + "..."
    plain = plain.replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain  # matplotlib hides labels that do
