"""The command line, one file per command: finetune, plan, tokens, cache, eval and the others."""

from __future__ import annotations

import typer

from .cache import app as cache
from .demo import demo
from .doctor import doctor
from .evaluate import evaluation
from .finetune import finetune
from .plan import plan
from .study import study
from .tokens import tokens

app = typer.Typer(
    name="str-kernels",
    help="Fine-tune an aligned language model without losing its refusals.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for command in (finetune, plan, demo, study, doctor):
    app.command()(command)
app.add_typer(cache)
app.add_typer(tokens, name="tokens")
app.add_typer(evaluation)


def main() -> None:
    """Run the command line."""
    app()
