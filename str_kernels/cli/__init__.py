"""The command line: str-kernels finetune | tokens | demo | doctor. One file per command."""

from __future__ import annotations

import typer

from .demo import demo
from .doctor import doctor
from .finetune import finetune
from .tokens import tokens

app = typer.Typer(
    name="str-kernels",
    help="Fine-tune an aligned language model without losing its refusals.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for command in (finetune, demo, doctor):
    app.command()(command)
app.add_typer(tokens, name="tokens")


def main() -> None:
    """Run the command line."""
    app()
