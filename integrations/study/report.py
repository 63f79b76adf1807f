"""The report of a study: a table for each task, the frontier as a figure, and sentences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...files import write_text
from .frontier import DEFAULT, draw_frontier
from .results import BASE, Found, Interval, Row, Summary

_PAIRS = tuple(
    (DEFAULT, other) for other in ("plain", "random", "likely", "rows (paper)", "refusal rows")
)
_MEASURES: dict[str, tuple[str, Callable[[Row], float]]] = {
    "harmful refused": ("points", lambda row: row.refused("harmful")),
    "harmless refused": ("points", lambda row: row.refused("harmless")),
    "right answers": ("points", lambda row: 100 * row.right / row.asked),
    "task loss": ("nats", lambda row: row.task_loss),
}
_HEADER = ("arm", "seeds", "harmful refused", "of the base's", "harmless refused",
           "over the base's", "right", "below plain", "task loss")  # fmt: skip


def write(found: Found, output: Path) -> dict[str, Any]:
    """Write study.md and frontier.png; return the tables and sentences.

    Args:
        found: the rows of a study.
        output: the folder.

    Returns:
        "header": the columns' titles. "tasks": rows of text for each task. "said": sentences.
    """
    tables = {task: _table(found, task) for task in found.tasks()}
    said = _sentences(found)
    lines = []
    for task, rows in tables.items():
        lines += [f"**{task}**", "", _line(_HEADER), "| --- " + "| ---: " * 8 + "|"]
        lines += [_line(row) for row in rows] + [""]
    write_text(output / "study.md", "\n".join([*lines, *said, ""]))
    draw_frontier(found, output / "frontier.png")
    return {"header": _HEADER, "tasks": tables, "said": said}


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(found: Found, task: str) -> list[tuple[str, ...]]:
    rows = []
    bases = found.of("sums", BASE)
    if bases:
        cells = _cells("taught base", found.summary("sums", BASE))
        of_task = cells[6:] if task == "sums" else ("-",) * 3  # the base is only asked sums
        rows.append((*cells[:6], *of_task))
    rows += [_cells(arm, found.summary(task, arm)) for arm in found.arms(task) if arm != BASE]
    return rows


def _cells(name: str, of: Summary) -> tuple[str, ...]:
    return (
        name,
        str(len(of.seeds)),
        f"{of.harmful:.1f} %",
        "-" if of.kept is None else f"{100 * of.kept:.0f} %",
        f"{of.harmless:.1f} %",
        "-" if of.over is None else f"{of.over:+.1f}",
        f"{of.right:.1f} %",
        "-" if of.cost is None or name == "taught base" else f"{of.cost:+.1f}",
        f"{of.task_loss:.3f}",
    )


def _sentences(found: Found) -> list[str]:
    """State the differences between arms, with intervals over the seeds."""
    said = []
    for task in found.tasks():
        for first, second in _PAIRS:
            parts, pairs = [], 0
            for name, (unit, measure) in _MEASURES.items():
                of = found.difference(task, first, second, measure)
                if of is not None:
                    parts.append(f"{name} {_interval(of, unit)}")
                    pairs = of.pairs
            if parts:
                said.append(f"{task}, {first} minus {second}: {'; '.join(parts)} ({pairs} seeds).")
    return said


def _interval(of: Interval, unit: str) -> str:
    digits = 3 if unit == "nats" else 1
    return f"{of.value:+.{digits}f} ({of.low:+.{digits}f} to {of.high:+.{digits}f}) {unit}"
