"""The commands that examine a kernel without a GPU."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from .. import tables
from ..command_options import Json, Results, Save
from ..results import FOLDER, append_rows, origin
from ..tables import Column, times


def sass(
    target: Annotated[str, typer.Option(help="sm_80, sm_90 or sm_100.")] = "sm_90",
    save: Save = False,
    results: Results = FOLDER,
    as_json: Json = False,
) -> None:
    """Count machine instructions per logit, ours and Liger's; a minute."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise typer.BadParameter("`TRITON_INTERPRET` must be unset; it leaves nothing to compile")
    from . import sass as made

    if target not in ("sm_80", "sm_90", "sm_100"):
        raise typer.BadParameter(f"`target` must be sm_80, sm_90 or sm_100; got {target!r}")
    rows = [origin("cpu", made.PROTOCOL) | row for row in made.measure(target)]
    if save:
        append_rows(results / "sass.csv", rows)
    if as_json:
        return tables.print_json(rows)
    tables.show(
        f"machine instructions per logit on {target}, forward and backward",
        [row for row in rows if not row["why"]],
        [
            Column("kernel", "what"),
            Column("passes", "instructions", "{:.1f}".format),
            Column("each", "passes"),
            Column("whole\nrow", "of_row", "{:.1f}".format),
            Column("clocks:\nissue", "clocks_issue", times),
            Column("alu", "clocks_alu", times),
            Column("mufu", "clocks_mufu", times),
            Column("memory", "clocks_memory", times),
        ],
    )
    for row in rows:
        if row["why"]:
            tables.say(f"{row['what']}: absent, {row['why']}")
    versions = dict.fromkeys(row["version"] for row in rows if not row["why"])
    tables.say(
        f"{rows[0]['protocol']} clocks: of an H200's multiprocessor, per logit, that each part of "
        f"it takes at least. triton {rows[0]['triton']}, {', '.join(versions)}."
    )


def execute(
    targets: Annotated[
        list[str] | None, typer.Option("--target", help="sm_80, sm_90 or sm_100; may be repeated.")
    ] = None,
    short: Annotated[bool, typer.Option("--small", help="Only the smallest kernels.")] = False,
    save: Save = False,
    results: Results = FOLDER,
    as_json: Json = False,
) -> None:
    """Execute the kernels' PTX on the CPU: instructions, bytes and barriers per logit."""
    given = targets or ["sm_90", "sm_100"]
    for target in given:
        if target not in ("sm_80", "sm_90", "sm_100"):
            raise typer.BadParameter(f"`target` must be sm_80, sm_90 or sm_100; got {target!r}")
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise typer.BadParameter("`TRITON_INTERPRET` must be unset; it leaves nothing to compile")
    from .execute import measure, show

    rows = measure(given, short=short)
    if save:
        append_rows(results / "execute.csv", rows)
    if as_json:
        return tables.print_json(rows)
    show(rows)
