"""The command line: str-kernels finetune | eval | demo | study | doctor. One file per command."""

from __future__ import annotations

import typer

from .demo import demo
from .doctor import doctor
from .evaluate import evaluation
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
app.add_typer(evaluation)


def main() -> None:
    """Run the command line."""
    app()
