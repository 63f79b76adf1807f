"""The command line: str-kernels finetune | cache | demo | study | doctor. One file per command."""

from __future__ import annotations

import typer

from .cache import app as cache
from .demo import demo
from .doctor import doctor
from .finetune import finetune
from .study import study

app = typer.Typer(
    name="str-kernels",
    help="Fine-tune an aligned language model without losing its refusals.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for command in (finetune, demo, study, doctor):
    app.command()(command)
app.add_typer(cache)


def main() -> None:
    """Run the command line."""
    app()
