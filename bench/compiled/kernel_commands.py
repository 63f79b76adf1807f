"""The commands that say what can be known of a kernel without a GPU."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import tables
from ..options import Json, Results, Save, kept, one_of, publish, refuse_the_interpreter
from ..results import FOLDER, origin
from ..tables import Column, times

_TARGETS = ("sm_80", "sm_90", "sm_100")


def sass(
    target: Annotated[str, typer.Option(help="sm_80, sm_90 or sm_100.")] = "sm_90",
    save: Save = False,
    results: Results = FOLDER,
    as_json: Json = False,
) -> None:
    """Count machine instructions per logit, ours and Liger's; a minute."""
    refuse_the_interpreter()
    from . import sass as made

    one_of("target", target, *_TARGETS)
    rows = [origin("cpu", made.PROTOCOL) | row for row in made.measure(target)]
    counted = [row for row in rows if not row["why"]]
    versions = dict.fromkeys(row["version"] for row in counted)
    publish(
        rows,
        results / "sass.csv" if save else None,
        as_json,
        f"machine instructions per logit on {target}, forward and backward",
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
        shown=counted,
        note=" clocks: of an H200's multiprocessor, per logit, that each part of it takes at "
        f"least. triton {rows[0]['triton']}, {', '.join(versions)}.",
    )
    for row in rows:
        if row["why"] and not as_json:
            tables.say(f"{row['what']}: absent, {row['why']}")


def execute(
    targets: Annotated[
        list[str] | None, typer.Option("--target", help="sm_80, sm_90 or sm_100; may be repeated.")
    ] = None,
    short: Annotated[bool, typer.Option("--small", help="The smallest kernels alone.")] = False,
    save: Save = False,
    results: Results = FOLDER,
    as_json: Json = False,
) -> None:
    """Execute the kernels' PTX on the CPU: instructions, bytes and barriers of each logit."""
    given = targets or ["sm_90", "sm_100"]
    for target in given:
        one_of("target", target, *_TARGETS)
    refuse_the_interpreter()
    from .execute import measure, show

    rows = measure(given, short=short)
    if not kept(rows, results / "execute.csv" if save else None, as_json):
        show(rows)
