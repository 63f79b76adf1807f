"""The common style of all figures: a sentence as the title, and a caption with the details."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ..evals import printable
from ..files import replacing

_WIDTH = 8.0  # inches; a README shows it at about 800 pixels, so 8 points are 11 pixels
_DPI = 200
# Wong's palette, which colour-blind people can tell apart. In comparisons blue is ours, vermilion
# the paper's form or naive STR, and grey is everything else.
BLUE, VERMILION, ORANGE = "#0072B2", "#D55E00", "#E69F00"
GREEN, PURPLE, SKY = "#009E73", "#CC79A7", "#56B4E9"
BLACK, GREY, PALE = "#222222", "#8A8A8A", "#CFCFCF"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY)  # for lines without such a meaning
QUIET, _GRID = "#555555", "#E4E4E4"
_TITLE, _TEXT, SMALL = 12.0, 9.0, 8.0  # points
_NAME = 24  # characters


@dataclass(frozen=True)
class Share:
    """A count of a total, with the interval of its fraction, in [0, 1]."""

    count: int
    total: int
    interval: Sequence[float]

    @property
    def percent(self) -> float:
        """Return the count in percent of the total; 0 if the total is 0."""
        return 100 * self.count / max(self.total, 1)


def new_figure(height: float, title: str, caption: str) -> Figure:
    """Return a figure with a title and a caption, both wrapped, and no panel yet.

    Args:
        height: inches.
        title: the figure's one statement.
        caption: the details: model, machine, counts, and what the whiskers are.
    """
    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.06)
    figure = Figure(figsize=(_WIDTH, height), layout=layout, facecolor="white")
    # 9.3 and 15.8: characters of DejaVu Sans per inch at these sizes, approximately
    text = _balanced(title, int(9.3 * _WIDTH))
    figure.suptitle(text, x=0.01, ha="left", fontsize=_TITLE, fontweight="bold", color=BLACK)
    text = textwrap.fill(caption, int(15.8 * _WIDTH), break_on_hyphens=False)
    figure.supxlabel(text, x=0.01, ha="left", fontsize=SMALL, color=QUIET)
    return figure


def _balanced(text: str, most: int) -> str:
    """Wrap text into as few lines as possible, of about equal length."""
    lines = len(textwrap.wrap(text, most, break_on_hyphens=False))
    for width in range(most // 2, most):
        wrapped = textwrap.wrap(text, width, break_on_hyphens=False)
        if len(wrapped) == lines:
            return "\n".join(wrapped)
    return textwrap.fill(text, most, break_on_hyphens=False)


def style(axes: Any, *, title: str = "", x: str = "", y: str = "", grid: str = "both") -> None:
    """Set a panel's labels and the common style.

    Args:
        axes: the panel.
        title: what is drawn, with its unit if no axis has it.
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
    """Put a legend into a panel."""
    axes.legend(fontsize=SMALL + 0.5, frameon=False, **options)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG on white, whole or not at all; its folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=_DPI, facecolor="white", transparent=False)


def whiskers(
    values: Sequence[float], low: Sequence[float], high: Sequence[float]
) -> list[list[float]]:
    """Return the distances of the bounds below and above their values, as matplotlib takes them."""
    # rounding may put a bound on the wrong side of its value
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
        names: one for each value.
        values: in the unit of the axis.
        colours: one for each value.
        bounds: lower and upper bounds; no whisker is drawn if all equal their values.
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
        names: one for each share.
        shares: the values.
        colours: one for each share.
        title: of the panel.
    """
    low, high = ([100 * share.interval[end] for share in shares] for end in (0, 1))
    draw_bars(axes, names, [share.percent for share in shares], colours, (low, high))
    write_beside(axes, high, [f"{share.count}/{share.total}" for share in shares])
    style(axes, title=title, x="%", grid="x")
    axes.set_xlim(0, 135)  # room for the counts beside 100 %
    axes.set_xticks(range(0, 101, 25))


def figure_label(text: str) -> str:
    """Return a name that matplotlib shows literally: shortened, with its math syntax escaped."""
    # a character without a glyph in the font would show as an empty box, with a warning
    plain = printable(text).encode("latin-1", "backslashreplace").decode("latin-1")
    if len(plain) > _NAME:
        plain = plain[: _NAME - 3] + "..."
    plain = plain.replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain  # matplotlib hides labels with "_"
