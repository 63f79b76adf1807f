"""The benchmarks' command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import torch
import typer

from . import redraw, results, tables
from .command_options import Json, Results, Save
from .compiled import kernel_commands
from .hub import hub
from .results import ROOT, Row
from .steps import step_commands
from .steps.heads import HEADS, HeadShape
from .tables import Column, megabytes, number, seconds, times

app = typer.Typer(add_completion=False, no_args_is_help=True)
app.command()(step_commands.cache)
app.command()(step_commands.anchors)
app.command()(step_commands.plan)
app.command()(step_commands.longcontext)
app.command()(kernel_commands.sass)
app.command()(kernel_commands.execute)
app.command()(redraw.figures)
app.command()(hub)

Head = Annotated[str, typer.Option(help=f"One of {', '.join(HEADS)}.")]
Ids = Annotated[int, typer.Option(min=1, help="Safety ids K.")]


@app.callback()
def main() -> None:
    """Benchmarks of str-kernels. Every provider is checked against eager before it is timed."""


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _shape(head: str) -> HeadShape:
    if head not in HEADS:
        raise typer.BadParameter(f"`head` must be one of {', '.join(HEADS)}; got {head!r}")
    return HEADS[head]


def _keep(rows: list[Row], save: bool, folder: Path, name: str) -> None:
    if save:
        results.append_rows(folder / f"{name}.csv", rows)


@app.command()
def speed(
    head: Head = "",
    tokens: Annotated[int, typer.Option(min=1, help="Rows N.")] = 2048,
    ids: Ids = 64,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    train_head: Annotated[bool, typer.Option(help="Compute the head's gradient too.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 15,
    providers: Annotated[
        list[str] | None, typer.Option(help="Only names that begin with this; may be repeated.")
    ] = None,
    all_options: Annotated[
        bool, typer.Option("--all-options", help="Add ours with every option of the loss on.")
    ] = False,
    pairs: Annotated[
        bool, typer.Option("--penalty-pairs", help="Only ours, with and without the penalty.")
    ] = False,
    memory: Annotated[bool, typer.Option(help="Measure the peak memory too.")] = True,
    save: Save = False,
    results: Results = results.FOLDER,
    as_json: Json = False,
) -> None:
    """Time the whole loss, forward and backward, against eager and the bare products."""
    from .steps.speed import Job, measure, penalty_pairs

    device = _device()
    head = head or ("llama-3" if device == "cuda" else "smollm2")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise typer.BadParameter(f"`dtype` must be bfloat16, float16 or float32; got {dtype!r}")
    job = Job(_shape(head), tokens, ids, getattr(torch, dtype), train_head, device)
    if pairs:
        rows = penalty_pairs(job, rounds, only=providers or ())
    else:
        rows = measure(job, rounds, only=providers or (), all_options=all_options, memory=memory)
    rows = [{"head": head, **row} for row in rows]
    _keep(rows, save, results, "penalty_pairs" if pairs else "speed")
    if as_json:
        return tables.print_json(rows)
    title = (
        f"{head}: N {tokens}, D {job.shape.width}, V {job.shape.vocab}, K {ids}, {dtype}, "
        f"{'trainable' if train_head else 'frozen'} head, {rows[0]['device']}"
    )
    if not pairs:
        return tables.show_speed(title, rows)
    tables.show(
        f"{title}: with the penalty, against without",
        rows,
        [
            Column("provider", "provider"),
            Column("status", "status"),
            Column("median", "median_ratio", "{:.3f} x".format),
            Column("lower\nquartile", "low_ratio", "{:.3f} x".format),
            Column("upper\nquartile", "high_ratio", "{:.3f} x".format),
        ],
    )
    tables.say_why(rows)
    tables.say(rows[0]["protocol"])


@app.command()
def memory(
    head: Head = "smollm2",
    tokens: Annotated[
        list[int] | None, typer.Option(help="N for both, by hand and ours; may be repeated.")
    ] = None,
    long: Annotated[
        list[int] | None, typer.Option(help="N for ours alone; may be repeated. Default: 131072.")
    ] = None,
    ids: Ids = 64,
    save: Save = False,
    results: Results = results.FOLDER,
    as_json: Json = False,
) -> None:
    """Peak memory against the number of tokens, on the CPU: by hand and ours."""
    from .memory.memory import LONG, TOKENS, measure

    # given N are the whole list: someone who asks for 64 tokens does not want 131,072 as well
    long_tokens = long or (() if tokens else (LONG,))
    given = tokens or (() if long else TOKENS)
    rows = measure(_shape(head), given, long=long_tokens, ids=ids)
    rows = [{"head": head, **row} for row in rows]
    _keep(rows, save, results, "memory")
    if as_json:
        return tables.print_json(rows)
    tables.show(
        f"{head}: peak memory above the inputs, frozen head, {rows[0]['dtype']}",
        rows,
        [
            Column("tokens", "N", "{:,}".format),
            Column("by hand\nMB", "eager", megabytes),
            Column("by hand,\npredicted MB", "eager_predicted", megabytes),
            Column("ours\nMB", "ours", megabytes),
            Column("of it the\ngradient MB", "gradient", megabytes),
            Column("ours,\nof by hand", "ratio", "{:.2%}".format),
        ],
    )
    tables.say(rows[0]["protocol"])


@app.command()
def attach(
    tokens: Annotated[int, typer.Option(min=1, help="Tokens in the row that is timed.")] = 1024,
    memory_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens in the row whose memory is measured.")
    ] = 4096,
    ids: Ids = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5,
    save: Save = False,
    results: Results = results.FOLDER,
    as_json: Json = False,
) -> None:
    """A training step of the built-in model: its own loss, attached, the reference's pass."""
    from .steps.attach_cost import measure

    device = _device()
    # not every CPU multiplies bfloat16, and one that does not takes minutes for a step
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    rows = measure(tokens, memory_tokens, ids, rounds, dtype, device)
    _keep(rows, save, results, "attach")
    if as_json:
        return tables.print_json(rows)
    tables.show(
        f"SmolLM2-135M, LoRA, 1 x {tokens:,} tokens, K {ids}, {rows[0]['dtype']}, "
        f"{rows[0]['device']}",
        rows,
        [
            Column("step", "who"),
            Column("seconds", "median_ms", seconds),
            Column("quartiles", "low_ms", seconds, upto="high_ms"),
            Column("/ own", "against_own", times),
            Column("added\n/ ref.", "added", times),
            Column("quartiles", "added_low", times, upto="added_high"),
            Column(f"peak MB,\n{memory_tokens:,}", "peak_bytes", megabytes),
        ],
    )
    tables.say(rows[0]["protocol"])


@app.command()
def growth(
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 7,
    figure: Annotated[Path, typer.Option(help="The PNG to write.")] = results.FIGURES
    / "growth.png",
    small: Annotated[
        bool, typer.Option("--small", help="Small sizes, for a quick try only.")
    ] = False,
    save: Save = False,
    results: Results = results.FOLDER,
    as_json: Json = False,
) -> None:
    """Growth of our time with N, V and D, and of our memory with N: a table and a figure."""
    from .memory.growth import SIZES, draw, measure

    sizes = {k: tuple(s // 16 for s in v[:2]) for k, v in SIZES.items()} if small else SIZES
    rows = measure(sizes, rounds, _device())
    _keep(rows, save, results, "growth")
    draw(rows, figure)
    if as_json:
        return tables.print_json(rows)
    for row in rows:
        unit = 1e6 if row["unit"] == "bytes" else 1
        row["shown"] = row["value"] / unit
    tables.show(
        f"growth on {rows[0]['device']}",
        rows,
        [
            Column("what grows", "grows"),
            Column("size", "size", "{:,}".format),
            Column("ms or MB", "shown", number),
            Column("off the\nline", "off", "{:.1%}".format),
        ],
    )
    tables.say(f"{rows[0]['protocol']} Figure: {figure}")


@app.command()
def trainers(
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps.")] = 10,
    figure: Annotated[Path, typer.Option(help="The PNG to write.")] = results.FIGURES
    / "trainers.png",
    save: Save = False,
    results: Results = results.FOLDER,
    as_json: Json = False,
) -> None:
    """Run LoRA in a plain loop, Accelerate, Trainer and TRL, and compare the losses by step."""
    from .steps.trainers import TRAINERS, draw, measure

    rows = measure(steps)
    _keep(rows, save, results, "trainers")
    draw(rows, figure)
    if as_json:
        return tables.print_json(rows)
    last = [max((r for r in rows if r["trainer"] == t), key=lambda r: r["step"]) for t in TRAINERS]
    for row in last:
        row["off"] = max(r["off"] for r in rows if r["trainer"] == row["trainer"])
    tables.show(
        f"{steps} steps of SmolLM2-135M with LoRA; the last step, and the largest distance",
        last,
        [
            Column("trainer", "trainer"),
            Column("loss", "loss", "{:.6f}".format),
            Column("penalty", "safety/penalty", "{:.6f}".format),
            Column("off the\nplain loop", "off", "{:.1e}".format),
        ],
    )
    tables.say(f"{rows[0]['protocol']} Figure: {figure}")


@app.command()
def traffic(
    vocab: Annotated[int, typer.Option(min=16, help="V.")] = 49152,
    ids: Ids = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Rows N.")] = 4,
    save: Save = False,
    results: Results = results.FOLDER,
    as_json: Json = False,
) -> None:
    """Count the bytes that the kernels ask for, per row, in Triton's interpreter."""
    from .memory.traffic import bound, interpret, measure

    interpret()
    rows = measure(vocab, ids, tokens)
    _keep(rows, save, results, "traffic")
    if as_json:
        return tables.print_json(rows)
    tables.show(
        f"bytes per row, forward and backward, bfloat16, V = {vocab:,}, K = {ids}",
        [row for row in rows if "bytes" in row],
        [
            Column("op", "op"),
            Column("up-\nstream", "upstream"),
            Column("bytes\nread", "read", number),
            Column("written", "written", number),
            Column("both", "bytes", number),
            Column("/ V", "of_vocab", "{:.2f}".format),
            Column("/ 4V", "of_minimum", times),
        ],
    )
    for row in rows:
        if row["why"]:
            tables.say(f"{row['op']}: absent, {row['why']}")
        elif row["penalty_percent"] is not None and row["upstream"] == 1.0:
            tables.say(f"{row['op']}: the penalty adds {row['penalty_percent']:.2f} % of the bytes")
        if row.get("within_bound") is False:
            tables.say(f"{row['op']}, upstream {row['upstream']}: over the bound")
    versions = dict.fromkeys(row["version"] for row in rows if "version" in row)
    tables.say(
        f"{rows[0]['protocol']} No op can ask for less than 4V. The bound, 6V + 32K + 128, is "
        f"{bound(vocab, ids):,}. {', '.join(versions)}."
    )


@app.command("compile")
def compile_kernels(
    every: Annotated[bool, typer.Option("--all", help="All configurations; minutes.")] = False,
    lines: Annotated[
        Path, typer.Option(help="JSON lines that --all adds to and resumes from.")
    ] = ROOT / ".benchmarks" / "compile.jsonl",
    save: Save = False,
    results: Results = results.FOLDER,
    as_json: Json = False,
) -> None:
    """Compile the kernels for GPUs without having one: registers, spills, width of the loads."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise typer.BadParameter("`TRITON_INTERPRET` must be unset; it leaves nothing to compile")
    from .compiled import compile_report as made
    from .results import origin

    with tables.progress("compiling") as (started, advanced):
        variants = made.every_variant() if every else made.sample()
        found = made.report(
            variants, lines=lines if every else None, started=started, advanced=advanced
        )
    runs = [row for target in ("sm_90", "gfx942") for row in made.launches_of_a_run(target)]
    rows = [origin("cpu", made.PROTOCOL) | row for row in (*found, *runs)]
    _keep(rows, save, results, "compile")
    bad = [row for row in rows if row.get("bad")]
    if as_json:
        tables.print_json(rows)
    else:
        made.show(rows, runs)
    raise typer.Exit(1 if bad else 0)


@app.command()
def figure(
    head: Head = "smollm2",
    dtype: Annotated[str, typer.Option(help="Which run: its dtype.")] = "bfloat16",
    train_head: Annotated[bool, typer.Option(help="Which run: with a trainable head.")] = False,
    to: Annotated[Path, typer.Option(help="The PNG to write.")] = results.FIGURES / "bench.png",
    results: Results = results.FOLDER,
    as_json: Json = False,
) -> None:
    """Draw the figure of the last saved run of `speed`, and print its table."""
    from .figure import draw, saved_runs

    path = results / "speed.csv"
    if not path.exists():
        raise typer.BadParameter(f"`results` must have speed.csv; {path} is missing")
    try:
        runs = saved_runs(results, head, dtype, train_head)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    draw(runs, to)
    rows = runs[0]
    if as_json:
        return tables.print_json(rows)
    print(tables.markdown([row for row in rows if row["status"] == "timed"], tables.SPEED))


if __name__ == "__main__":
    app()
