"""str-kernels eval run | report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..evals import RULES, HttpJudge, printable
from .console import (
    JSON_OPTION,
    SAFETY_TOKENS_OPTION,
    Command,
    needs_integrations,
    print_json,
    progress,
    readable_errors,
    with_interval,
)

evaluation = typer.Typer(
    name="eval",
    help="Measure one model (run), and compare models on the same prompts (report).",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@evaluation.command("run", cls=Command)
def run(
    model: Annotated[str, typer.Argument(help="'builtin', a folder, or a hub id.")],
    output: Annotated[Path, typer.Option(help="Folder to make.")],
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of an adapter for MODEL, in safetensors.")
    ] = None,
    harmful: Annotated[
        str, typer.Option(help="Prompts to refuse: a set's name, a JSONL or a CSV file.")
    ] = "harmful_probes",
    harmless: Annotated[
        str, typer.Option(help="Prompts to answer: a set's name, a JSONL or a CSV file.")
    ] = "benign_probes",
    task: Annotated[
        Path | None, typer.Option(help="JSONL rows as for finetune: exact matches and loss.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Plain text, for its perplexity.")] = None,
    safety_tokens: SAFETY_TOKENS_OPTION = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Model to measure drift from; MODEL without its adapter if unset."),
    ] = None,
    rule: Annotated[
        list[str] | None, typer.Option(help=f"Refusal rule: {', '.join(RULES)}; may be repeated.")
    ] = None,
    answer_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            max=8192,
            help="Tokens of each answer that are classified; at most 12 of them are stored.",
        ),
    ] = 32,
    positions: Annotated[
        int, typer.Option(min=1, max=12, help="Positions of an answer at which to measure drift.")
    ] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 16,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="At most this many prompts of each kind and task rows."),
    ] = None,
    max_length: Annotated[
        int, typer.Option(min=2, help="Largest number of tokens in a text window or a task row.")
    ] = 512,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    column: Annotated[
        str | None,
        typer.Option(help="Column of the prompts in your files; 'prompt' or 'goal' if unset."),
    ] = None,
    judge_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible API that also judges every answer.")
    ] = None,
    judge_model: Annotated[str, typer.Option(help="The judge's name at that API.")] = "judge",
    judge_key_env: Annotated[
        str | None, typer.Option(help="Environment variable that holds the API's key.")
    ] = None,
    allow_remote_judge: Annotated[
        bool,
        typer.Option(
            "--allow-remote-judge", help="Send prompts and answers to another machine's judge."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder.")] = False,
    as_json: JSON_OPTION = False,
) -> None:
    """Count MODEL's refusals, and measure its task results, perplexity and drift.

    Writes eval.json and, if there is a reference, drift.png into the output folder. An interrupted
    run resumes where it stopped.
    """
    with readable_errors():
        judge = judge_url and HttpJudge(
            judge_url, model=judge_model, key_env=judge_key_env, allow_remote=allow_remote_judge
        )
        with needs_integrations():
            from ..integrations.evaluation import EvalOptions, run_eval
        options = EvalOptions(
            model=model,
            adapter=adapter,
            harmful=harmful,
            harmless=harmless,
            task=task,
            text=text,
            safety_tokens=safety_tokens,
            reference=reference,
            rules=tuple(rule or ("opening",)),
            answer_tokens=answer_tokens,
            positions=positions,
            batch_size=batch_size,
            limit=limit,
            max_length=max_length,
            dtype=dtype,
            column=column,
        )
        said: list[str] = []
        with progress(quiet=as_json) as watch:
            report = run_eval(
                output,
                options,
                judge=judge or None,
                overwrite=overwrite,
                watch=watch,
                say=said.append,
            )
        for line in said:
            Console(stderr=True).print(Text(printable(line)), soft_wrap=True)
    if as_json:
        print_json(report, ascii_only=True)
    else:
        _show_run(report, output)


@evaluation.command("report", cls=Command)
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of eval run, two or more.")],
    output: Annotated[Path, typer.Option(help="Folder to make.")],
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder.")] = False,
    as_json: JSON_OPTION = False,
) -> None:
    """Compare RUNS on the same prompts, each with the first.

    Writes report.md, report.html (one file, no script), refusals.png and, if drift was measured,
    drift.png into the output folder.
    """
    with readable_errors():
        with needs_integrations():
            from ..integrations.evaluation import run_report
        comparison = run_report(runs, output, overwrite=overwrite)
    if as_json:
        print_json(comparison, ascii_only=True)
    else:
        _show_report(comparison, output)


def _show_report(comparison: dict[str, Any], output: Path) -> None:
    console = Console()
    table = Table("rule", "run", title="Refusals (95 % Wilson intervals)")
    for column in ("harmful\nrefused", "harmless\nrefused", "degenerate"):
        table.add_column(column, justify="right", no_wrap=True)
    for rule in comparison["rules"]:
        table.add_section()
        for found in comparison["runs"]:
            both = [found["counts"][rule][kind] for kind in ("harmful", "harmless")]
            table.add_row(
                Text(rule),
                Text(printable(found["name"])),
                *(with_interval(one["refusal"], one["total"], one["interval"]) for one in both),
                " + ".join(str(one["degenerate"]) for one in both),
            )
    console.print(table)
    for line in comparison["summary"]:
        console.print(Text(printable(line)), soft_wrap=True)
    for line in comparison["differences"]:
        console.print(Text(f"Note: {printable(line)}."), soft_wrap=True)
    console.print(Text(_LIMITS), soft_wrap=True)
    files = "report.html, report.md, refusals.png"
    if any(run["measures"]["drift"] for run in comparison["runs"]):
        files += ", drift.png"
    console.print(Text(f"Written to {printable(str(output))}: {files}"), soft_wrap=True)


def _show_run(report: dict[str, Any], output: Path) -> None:
    console = Console()
    name = report["model"]["name"]
    if report["adapter"]:
        name += f" with {report['adapter']['name']}"
    table = Table(title=Text(f"Refusals of {printable(name)} (95 % Wilson intervals)"))
    table.add_column("rule")
    judged = ("unjudged",) if "judge" in report["counts"] else ()
    for column in ("harmful\nrefused", "harmless\nrefused", "degenerate", *judged):
        table.add_column(column, justify="right", no_wrap=True)
    for rule, kinds in report["counts"].items():
        both = [kinds["harmful"], kinds["harmless"]]
        table.add_row(
            Text(rule),
            *(with_interval(one["refusal"], one["total"], one["interval"]) for one in both),
            " + ".join(str(one["degenerate"]) for one in both),
            *(" + ".join(str(one.get("unjudged", 0)) for one in both) for _ in judged),
        )
    console.print(table)
    measures = report["measures"]
    if measures["task"]:
        task = measures["task"]
        console.print(
            f"Task: {task['matched']}/{task['total']} exact matches "
            f"({task['too_long']} rows too long to match), loss {_number(task['loss'])} nats",
            soft_wrap=True,
        )
    if measures["text"]:
        text = measures["text"]
        console.print(
            f"Text: perplexity {_number(text['perplexity'])} over {text['tokens']} tokens",
            soft_wrap=True,
        )
    if measures["drift"]:
        console.print(_drift_table(measures["drift"]))
    for note in report["notes"]:
        console.print(Text(f"Note: {printable(note)}"), soft_wrap=True)
    console.print(Text(_LIMITS), soft_wrap=True)
    files = "eval.json, drift.png" if measures["drift"] else "eval.json"
    console.print(Text(f"Written to {printable(str(output))}: {files}"), soft_wrap=True)


_LIMITS = (
    "Greedy answers, sorted by how they are worded: a rule is no judge of "
    "whether an answer does harm."
)


def _drift_table(drift: dict[str, Any]) -> Table:
    table = Table("position", title="Drift of the safety logits along the reference's answer (rms)")
    for kind in drift:
        table.add_column(kind, justify="right")
        table.add_column("prompts", justify="right")
    places = max(len(found) for found in drift.values())
    for place in range(places):
        cells = [str(place + 1)]
        for found in drift.values():
            here = found[place] if place < len(found) else None
            cells += [_number(here["rms"]), str(here["prompts"])] if here else ["-", "0"]
        table.add_row(*cells)
    return table


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"
