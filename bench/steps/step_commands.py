"""The commands that time a training step of the built-in model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from .. import tables
from ..command_options import Json, Results, Save
from ..results import FOLDER, Row, append_rows, read_rows
from ..tables import Column, megabytes, number


def cache(
    rows: Annotated[int, typer.Option(min=1, help="Rows of the batch.")] = 2,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each row.")] = 128,
    ids: Annotated[int, typer.Option(min=1, help="Safety ids K.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 7,
    save: Save = False,
    results: Results = FOLDER,
    as_json: Json = False,
) -> None:
    """A training step of the built-in model: reference from a cache, live, and none at all."""
    from .cache_cost import measure

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    measured = measure(rows, tokens, ids, rounds, dtype, device)
    if save:
        append_rows(results / "cache.csv", measured)
    if as_json:
        return tables.print_json(measured)
    tables.show(
        f"SmolLM2-135M, LoRA, {rows} x {tokens:,} tokens, K {ids}, {measured[0]['dtype']}, "
        f"{measured[0]['device']}",
        measured,
        [
            Column("step", "who"),
            Column("ms", "median_ms", number),
            Column("quartiles", "low_ms", number, upto="high_ms"),
            Column("/ no ids", "against_no_ids", "{:.3f}".format),
            Column("quartiles", "against_low", "{:.3f}".format, upto="against_high"),
        ],
    )
    tables.say(measured[0]["protocol"])


def anchors(
    rows: Annotated[int, typer.Option(min=1, help="Rows of the batch.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each row.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 7,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    save: Save = False,
    results: Results = FOLDER,
    as_json: Json = False,
) -> None:
    """A training step of the built-in model: plain, with anchors alone, with the rows' penalty."""
    from .anchor_cost import measure

    if dtype not in ("bfloat16", "float16", "float32"):
        raise typer.BadParameter(f"`dtype` must be bfloat16, float16 or float32; got {dtype!r}")
    measured = measure(rows, tokens, rounds, getattr(torch, dtype))
    if save:
        append_rows(results / "anchors.csv", measured)
    if as_json:
        return tables.print_json(measured)
    tables.show(
        f"SmolLM2-135M, LoRA, {rows} x {tokens:,} tokens, {dtype}, {measured[0]['device']}",
        measured,
        [
            Column("step", "who"),
            Column("ms", "median_ms", number),
            Column("quartiles", "low_ms", number, upto="high_ms"),
            Column("/ no ids", "against_no_ids", "{:.3f}".format),
            Column("quartiles", "no_ids_low", "{:.3f}".format, upto="no_ids_high"),
            Column("/ own loss", "against_own", "{:.3f}".format),
        ],
    )
    tables.say(measured[0]["protocol"])


def plan(
    tokens: Annotated[
        list[int] | None, typer.Option(help="In a row; may be repeated. Default: 256 to 2048.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of the batch.")] = 2,
    others: Annotated[
        bool, typer.Option(help="By hand, with a reference pass, a mask and eager attention, too.")
    ] = True,
    save: Save = False,
    results: Results = FOLDER,
    as_json: Json = False,
) -> None:
    """Compare peaks that `str-kernels plan` predicts for the built-in model with measured ones."""
    from ..memory.plan import OTHERS_AT, TOKENS, measure

    with tables.progress("measuring") as (_, advanced):
        measured = measure(
            tokens or TOKENS,
            batch=batch,
            others_at=OTHERS_AT if others else None,
            advanced=advanced,
        )
    if save:
        append_rows(results / "plan.csv", measured)
    if as_json:
        return tables.print_json(measured)
    for row in measured:
        extra = [name for name in ("checkpointing", "padding") if row[name]]
        extra += [row["attention"]] if row["attention"] != "sdpa" else []
        extra += [f"{row['reference']} reference"] if row["reference"] != "none" else []
        row["what"] = ", ".join([row["who"], *extra])
    columns = [
        Column("loss", "what"),
        Column("tokens", "tokens", number),
        Column("step,\npredicted MB", "predicted_step", megabytes),
        Column("measured\nMB", "measured_step", megabytes),
        Column("ratio", "step_ratio", "{:.3f}".format),
        Column("peak,\npredicted MB", "predicted_peak", megabytes),
        Column("measured\nMB", "measured_peak", megabytes),
        Column("ratio", "peak_ratio", "{:.3f}".format),
    ]
    tables.show(f"SmolLM2-135M, LoRA, {batch} rows, {measured[0]['dtype']}", measured, columns)
    tables.say(measured[0]["protocol"])


def longcontext(
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=17, help="In the row; may be repeated. Default: 2048 and 8192."),
    ] = None,
    ways: Annotated[
        list[str] | None, typer.Option("--way", help="Only these; may be repeated.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds over all ways.")] = 1,
    memory: Annotated[float, typer.Option(min=0.1, help="GB that a process may take.")] = 24.0,
    allocator: Annotated[
        str,
        typer.Option(help="pages: as `finetune` sets it; default: glibc as it is."),
    ] = "pages",
    figure: Annotated[
        Path | None, typer.Option(help="A PNG of all saved rows with this allocator.")
    ] = None,
    parts: Annotated[
        bool, typer.Option("--parts", help="Compute what holds the memory of a step instead.")
    ] = False,
    planned: Annotated[
        bool, typer.Option("--planned", help="Compute the memory of 1B, 8B and 70B models.")
    ] = False,
    save: Save = False,
    results: Results = FOLDER,
    as_json: Json = False,
) -> None:
    """Long rows: peak memory and time of a training step, each way in its own process."""
    from ..memory import longcontext as bench
    from ..memory import longcontext_plan
    from ..memory.memory_parts import parts_of

    lengths = tokens or list(bench.TOKENS)
    if (parts or planned) and (save or figure or ways or parts == planned):
        raise typer.BadParameter("`--parts` and `--planned` stand alone: they measure nothing")
    if parts:
        found = parts_of(lengths)
        return tables.print_json(found) if as_json else show_parts(found)
    if planned:
        with tables.progress("planning") as (_, advanced):
            found = longcontext_plan.planned(tokens or longcontext_plan.TOKENS, advanced=advanced)
        return tables.print_json(found) if as_json else show_planned(found)
    for name in ways or ():
        if name not in bench.WAYS:
            raise typer.BadParameter(f"`--way` must be of {', '.join(bench.WAYS)}; got {name!r}")
    if allocator not in bench.ALLOCATORS:
        raise typer.BadParameter(f"`--allocator` must be pages or default; got {allocator!r}")
    file = results / "longcontext.csv"

    def keep(row: Row) -> None:
        if save:
            append_rows(file, [row])

    with tables.progress("measuring") as (_, advanced):
        measured = bench.measure(
            lengths,
            ways or bench.WAYS,
            rounds=rounds,
            memory=memory,
            allocator=allocator,
            advanced=keep,
            ran=advanced,
        )
    if figure is not None:
        bench.draw_saved(read_rows(file) if save else measured, figure, allocator)
    if as_json:
        return tables.print_json(measured)
    columns = [
        Column("loss", "who"),
        Column("tokens", "tokens", number),
        Column("MB", "peak", str),
        Column("/ own", "peak_against_own", tables.times),
        Column("/ naive", "peak_against_naive", tables.times),
        Column("s", "seconds", "{:.1f}".format),
        Column("/ own", "time_against_own", tables.times),
        Column("/ naive", "time_against_naive", tables.times),
    ]
    for row in measured:
        known = row["status"] == "measured"
        row["peak"] = megabytes(row["peak_bytes"]) if known else row["status"]
    tables.show(f"one row, allocator {allocator}, {measured[0]['device']}", measured, columns)
    tables.say(measured[0]["protocol"])


def show_parts(found: list[Row]) -> None:
    """Print what holds the memory of a step."""
    columns = [
        Column("tokens", "tokens", number),
        Column("when", "phase"),
        Column("what", "part"),
        Column("MB", "bytes", megabytes),
        Column("bytes a\ntoken", "bytes_a_token", "{:,.0f}".format),
    ]
    tables.show("Tensors alive at the peak of each phase, above the weights", found, columns)


def show_planned(found: list[Row]) -> None:
    """Print the memory that larger models would need, and the smallest card that has it."""
    from ..memory.longcontext_plan import smallest_card

    ways = ("own", "naive", "ours")
    rows = [
        row
        | {f"{way}_text": f"{row[way] / 1e9:,.1f} GB ({smallest_card(row, way)})" for way in ways}
        for row in found
    ]
    columns = [
        Column("model", "model"),
        Column("tokens", "tokens", number),
        *(Column(way, f"{way}_text") for way in ways),
    ]
    tables.show("Peak, and the smallest card with a tenth left free; computed", rows, columns)
