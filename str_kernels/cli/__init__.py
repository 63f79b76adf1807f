"""The command line, one file per command: finetune, plan, tokens, cache, eval and the others."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from .. import __version__
from .cache import app as cache
from .console import Command
from .demo import demo
from .doctor import doctor
from .evaluate import evaluation
from .export import export
from .finetune import finetune
from .plan import plan
from .study import study
from .tokens import tokens

app = typer.Typer(
    name="str-kernels",
    help="Fine-tune an aligned language model without losing its refusals.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
# options that finetune does not define are TRL's
_OPEN = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(cls=Command, context_settings=_OPEN)(finetune)
for command in (export, plan, demo, study, doctor):
    app.command(cls=Command)(command)
app.add_typer(cache)
app.add_typer(tokens, name="tokens")
app.add_typer(evaluation)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"str-kernels {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            envvar="STR_KERNELS_DEBUG",
            help="Show an error's traceback. Goes before the command's name.",
        ),
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Fine-tune an aligned language model without losing its refusals."""


def main() -> None:
    """Run the command line."""
    # TRL's trainers report each run to the hub, which the user of a command did not ask for
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    app(prog_name="str-kernels")
