"""`python -m bench figures`: redraw every figure of the docs from the saved rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from . import tables
from .results import FIGURES, FOLDER, newest, read_rows


def figures(
    to: Annotated[Path, typer.Option(help="The folder of the PNGs.")] = FIGURES,
    results: Annotated[Path, typer.Option(help="The folder of the CSV files.")] = FOLDER,
) -> None:
    """Redraw every figure of the docs from the saved rows, without measuring anything."""
    for name, draw in DRAWINGS.items():
        draw(results, to / name)
        tables.say(str(to / name))


def _bench(results: Path, path: Path) -> None:
    from .figure import draw, saved_runs

    draw(saved_runs(results, "smollm2", "bfloat16", False), path)


def _growth(results: Path, path: Path) -> None:
    from .memory.growth import draw

    draw(newest(read_rows(results / "growth.csv")), path)


def _trainers(results: Path, path: Path) -> None:
    from .steps.trainers import draw

    draw(newest(read_rows(results / "trainers.csv")), path)


def _longcontext(results: Path, path: Path) -> None:
    from .memory.longcontext import draw_saved

    draw_saved(read_rows(results / "longcontext.csv"), path)


def _frontier(results: Path, path: Path) -> None:
    from str_kernels.integrations.study import draw_study

    draw_study(results / "study.csv", path)


def _demo(results: Path, path: Path) -> None:
    from str_kernels.evals import wilson_interval
    from str_kernels.integrations.demo import draw_comparison

    def counted(row: dict[str, str], count: str, total: str, name: str) -> dict[str, object]:
        found = int(row[count]), int(row[total])
        return {name: found[0], "total": found[1], "interval": wilson_interval(*found)}

    runs = [
        {
            "name": row["name"],
            "harmful": counted(row, "harmful_refused", "harmful_asked", "refusal"),
            "benign": counted(row, "harmless_refused", "harmless_asked", "refusal"),
            "accuracy": counted(row, "right", "asked", "count"),
        }
        for row in newest(read_rows(results / "demo.csv"))
    ]
    draw_comparison(runs, path)


DRAWINGS: dict[str, Callable[[Path, Path], None]] = {
    "bench.png": _bench,
    "demo.png": _demo,
    "frontier.png": _frontier,
    "growth.png": _growth,
    "longcontext.png": _longcontext,
    "trainers.png": _trainers,
}
