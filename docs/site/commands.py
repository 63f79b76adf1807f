"""What the reference says of options: the commands' `--help`, and the trainers' settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer
from rich.text import Text

from str_kernels.attach_options import SETTINGS
from str_kernels.cli import app

_INTRODUCTION = """# Command line

Every command has `--help`, and `--json` for programs. A wrong argument ends a command with one
line and exit code 2; `str-kernels --debug COMMAND` shows where in the code it comes from."""


def page() -> str:
    """Return the whole page."""
    return (
        "\n\n".join([_INTRODUCTION, *_commands("str-kernels", typer.main.get_command(app))]) + "\n"
    )


def settings() -> str:
    """Return the fields that trainers and commands share, with defaults and meanings."""
    return "\n\n".join(
        f"`{one.name}` = `{one.default!r}`\n:   {_plain(one.described)}"
        for one in SETTINGS
        if not one.hidden
    )


def _commands(name: str, command: Any) -> Iterator[str]:
    if hasattr(command, "commands"):
        for part, inner in command.commands.items():
            yield from _commands(f"{name} {part}", inner)
        return
    yield f"## {name}"
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    usage = [name, *(_argument(p) for p in arguments), "[OPTIONS]"]
    yield f"```\n{' '.join(usage)}\n```"
    yield _plain(command.help or "")
    for argument in arguments:
        yield f"`{argument.name.upper()}`\n:   {_meaning(argument)}"
    panel = None
    for option in options:
        title = getattr(option, "rich_help_panel", None)
        if title != panel:
            panel = title
            yield f"**{title or 'Other options'}**"
        value = "" if option.is_flag else " VALUE"
        names = [*option.opts, *option.secondary_opts]
        yield ", ".join(f"`{text}{value}`" for text in names) + f"\n:   {_meaning(option)}"


def _argument(parameter: Any) -> str:
    name = parameter.name.upper() + ("..." if parameter.nargs == -1 else "")
    return name if parameter.required else f"[{name}]"


def _meaning(parameter: Any) -> str:
    words = [_plain(parameter.help or "")]
    shown = getattr(parameter, "show_default", None)  # a text where the default is made elsewhere
    default = shown if isinstance(shown, str) else parameter.default
    if isinstance(default, str | int | float) and not isinstance(default, bool):
        words.append(f"Default: `{default}`.")
    if parameter.required and parameter.param_type_name == "option":
        words.append("Required.")
    return " ".join(words)


def _plain(text: str) -> str:
    """Return help without Rich's marks, and with its angle brackets as text."""
    return Text.from_markup(text).plain.replace("<", "&lt;").replace("\b\n", "")
