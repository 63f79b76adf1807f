"""What every command shares: errors in one line, progress, JSON, counts with intervals."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..evals.printable import printable

JSON_OPTION = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON and nothing else.")
]
SAFETY_TOKENS_OPTION = Annotated[
    Path | None, typer.Option(help="A safety_tokens.json, instead of the templates.")
]
TEMPLATES_OPTION = Annotated[
    Path | None, typer.Option(help="Refusal templates, one per line, instead of the built-in.")
]
_PACKAGE = __package__.partition(".")[0]


def import_integration(name: str) -> Any:
    """Import what needs transformers and peft, or say how to install them."""
    import importlib

    try:
        return importlib.import_module(f".integrations.{name}", _PACKAGE)
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith(_PACKAGE):
            raise
        raise ValueError(
            f"this command must have {error.name} installed; run: pip install 'str-kernels[hf]'"
        ) from error


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Turn bad input into one line and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        # line by line: a message may quote a file that holds escape sequences
        said = "\n".join(printable(line) for line in str(error).splitlines())
        Console(stderr=True).print(f"[bold red]error:[/] {escape(said)}", soft_wrap=True)
        raise typer.Exit(2) from error


@contextlib.contextmanager
def progress(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
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
    with Progress(*columns, console=console, disable=quiet) as bars:
        tasks: dict[str, Any] = {}

        def watch(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    bars.stop_task(task)
                tasks[stage] = bars.add_task(escape(stage), total=total)
            bars.update(tasks[stage], completed=done)

        yield watch


def print_json(value: Any, *, ascii_only: bool = False) -> None:
    """Print a value as indented JSON; in ASCII where it holds what a model or a stranger wrote."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=ascii_only)
    sys.stdout.write("\n")


def with_interval(count: int, total: int, interval: list[float]) -> str:
    """Return a count of a total, and its interval in percent on a second line."""
    low, high = interval
    return f"{count}/{total}\n{100 * low:.0f}-{100 * high:.0f} %"
