"""What the commands share: their options, and what becomes of the rows that they make."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from . import tables
from .results import Row, append_rows
from .tables import Column

Ids = Annotated[int, typer.Option(min=1, help="Safety ids K.")]
Rounds = Annotated[int, typer.Option(min=1, help="Interleaved rounds.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16 or float32.")]
Json = Annotated[bool, typer.Option("--json", help="Print rows as JSON only.")]
Save = Annotated[bool, typer.Option("--save", help="Add the rows to a CSV file in --results.")]
Results = Annotated[Path, typer.Option(help="The folder of the CSV files.")]


def device_here() -> str:
    """Return "cuda" where there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def step_dtype(device: str) -> torch.dtype:
    """Return the dtype of a training step; not every CPU multiplies bfloat16 in good time."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype that `--dtype` names."""
    return getattr(torch, one_of("dtype", name, "bfloat16", "float16", "float32"))  # type: ignore[no-any-return]


def one_of(option: str, given: str, *names: str) -> str:
    """Return what is given if it is one of the names; typer.BadParameter if not."""
    if given not in names:
        raise typer.BadParameter(f"`{option}` must be one of {', '.join(names)}; got {given!r}")
    return given


def refuse_the_interpreter() -> None:
    """Raise where Triton would interpret its kernels instead of compiling them."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise typer.BadParameter("`TRITON_INTERPRET` must be unset; it leaves nothing to compile")


def kept(rows: Sequence[Row], file: Path | None, as_json: bool) -> bool:
    """Add rows to a CSV file, if one is given, and print them as JSON, if asked to; say if so."""
    if file is not None:
        append_rows(file, rows)
    if as_json:
        tables.print_json(rows)
    return as_json


def publish(
    rows: Sequence[Row],
    file: Path | None,
    as_json: bool,
    title: str,
    columns: Sequence[Column],
    *,
    shown: Sequence[Row] | None = None,
    note: str = "",
) -> None:
    """Save rows and print them.

    Args:
        rows: all of them.
        file: the CSV file that they are added to, if any.
        as_json: whether to print them as JSON, and nothing else.
        title: of the table.
        columns: of the table.
        shown: the table's rows, if they are others.
        note: printed after the protocol.
    """
    if not kept(rows, file, as_json):
        tables.show(title, rows if shown is None else shown, columns)
        tables.say(f"{rows[0]['protocol']}{note}")
