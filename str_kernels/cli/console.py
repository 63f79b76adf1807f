"""Shared by all commands: one-line errors, progress, JSON output, counts with intervals."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from typer.core import TyperCommand
from typing_extensions import override

from ..evals import printable

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
_MAY_BE_EMPTY = {"--answer-start"}  # free text; all others are names, numbers or files
# Arguments of functions whose command-line option has another name.
_GIVEN_AS = {
    "allow_remote": "allow_remote_judge",
    "key_env": "judge_key_env",
    "portions": "portion",
    "prompts": "anchors",
    "rules": "rule",
    "tokens_per_template": "positions",
    "url": "judge_url",
}
_OF_AN_ARGUMENT = re.compile(r"`\w+` must ")
_running: ContextVar[typer.Context | None] = ContextVar("running", default=None)


class Command(TyperCommand):
    """A command whose errors name the options as they are typed."""

    @override
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse an empty value, such as a shell variable that is not set."""
        with readable_errors():
            for before, value in itertools.pairwise(["", *args]):
                option = before if value == "" else value.removesuffix("=")
                empty = value == "" or (value.startswith("--") and value.endswith("="))
                if empty and option not in _MAY_BE_EMPTY:
                    named = f"`{option}`" if option.startswith("-") else "an argument"
                    raise ValueError(f"{named} must not be empty; got ''")
        return super().parse_args(ctx, args)

    @override
    def invoke(self, ctx: Any) -> Any:
        """Run the command, and tell `readable_errors` which one it is."""
        token = _running.set(ctx)
        try:
            return super().invoke(ctx)
        finally:
            _running.reset(token)


@contextlib.contextmanager
def needs_integrations() -> Iterator[None]:
    """Wrap imports that need transformers or peft: a missing package gives an error with advice."""
    # bitsandbytes logs advice about its installation, which is of no use to the user of a command.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith(_PACKAGE):
            raise
        extra = "trl" if error.name in ("trl", "datasets") else "hf"
        # not by the package's name: it is not on the index, where a stranger could register it
        raise ValueError(
            f"this command must have {error.name} installed; run: pip install '.[{extra}]' in a "
            f"checkout of str-kernels, or install the wheel again as 'PATH/TO/WHEEL[{extra}]'"
        ) from error


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Turn bad input into a one-line error and exit code 2; our own bugs keep their traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        if isinstance(error, TypeError) and not _OF_AN_ARGUMENT.match(str(error)):
            raise
        context = _running.get()
        if context is not None and context.find_root().params.get("debug"):
            traceback.print_exc()
        # escaped line by line, since a message may quote a file that holds escape sequences
        said = "\n".join(printable(line) for line in _as_typed(error, context).splitlines())
        Console(stderr=True).print(f"[bold red]error:[/] {escape(said)}", soft_wrap=True)
        raise typer.Exit(2) from error


def _as_typed(error: Exception, context: typer.Context | None) -> str:
    """Return an error's message, with arguments named as the command's options."""
    said = str(error)
    if context is None:
        return said
    options = {
        parameter.name: max(parameter.opts, key=len)
        for parameter in context.command.params
        if parameter.param_type_name == "option"
    }
    if isinstance(error, OSError) and error.filename is not None:
        of = [name for name, value in context.params.items() if str(value) == str(error.filename)]
        named = [f"`{options.get(name, name)}`: " for name in of[:1]]
        return "".join(named) + said

    def option(match: re.Match[str]) -> str:
        before, name, after = match.groups()
        name = name if name in options else _GIVEN_AS.get(name)
        return f"{before}{options[name]}{after}" if name in options else match[0]

    return re.sub(r"(`|unless )(\w+)(`| is set)", option, said)


@contextlib.contextmanager
def progress(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress bar for each stage."""
    import warnings

    import transformers

    # Deprecations inside transformers and peft concern their authors, not the user of a command.
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
                for task in bars.tasks:
                    bars.stop_task(task.id)
                    if task.total == 1:  # only a line of text: done when the next begins
                        bars.update(task.id, completed=1)
                tasks[stage] = bars.add_task(escape(stage), total=total)
            bars.update(tasks[stage], completed=done)

        yield watch
        for task in bars.tasks:
            if task.total == 1:  # the last of them, which no other follows
                bars.update(task.id, completed=1)


def print_json(value: Any, *, ascii_only: bool = False) -> None:
    """Print a value as indented JSON; use `ascii_only` if it contains untrusted text."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=ascii_only)
    sys.stdout.write("\n")


def with_interval(count: int, total: int, interval: list[float]) -> str:
    """Return "count/total", and its interval in percent on a second line."""
    low, high = interval
    return f"{count}/{total}\n{100 * low:.0f}-{100 * high:.0f} %"
