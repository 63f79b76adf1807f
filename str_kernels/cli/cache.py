"""str-kernels cache build | verify | info."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..op import Backend, PenaltyKind, read_json_object
from ..reference_cache import (
    DATED,
    DTYPES,
    OF_A_DAY,
    CachedReference,
    read_plan,
    read_timings,
    verify_cache,
)
from .console import (
    JSON_OPTION,
    SAFETY_TOKENS_OPTION,
    TEMPLATES_OPTION,
    Command,
    needs_integrations,
    print_json,
    progress,
    readable_errors,
)

app = typer.Typer(
    name="cache",
    help="Compute the frozen model's safety logits for a data file once, and store them.",
    no_args_is_help=True,
)
_FOLDER = Annotated[Path, typer.Argument(help="The cache.")]
_MODEL_DTYPE = Annotated[
    str, typer.Option(help="Dtype of the model's weights: auto, float32, bfloat16 or float16.")
]
_TIMED_TOKENS = 20_000  # tokens looked up to measure the time


@app.command(cls=Command)
def build(
    model: Annotated[str, typer.Argument(help="'builtin', a folder, or a hub id.")],
    output: Annotated[Path, typer.Option(help="Folder to make, or to resume in.")],
    data: Annotated[
        Path | None,
        typer.Argument(help="JSONL, as for finetune; left out with --positions none."),
    ] = None,
    positions: Annotated[
        str,
        typer.Option(
            help="As in training: 'none' stores the anchors alone, anything else the rows too."
        ),
    ] = "none",
    safety_tokens: SAFETY_TOKENS_OPTION = None,
    templates: TEMPLATES_OPTION = None,
    anchors: Annotated[
        str | None,
        typer.Option(
            help='Anchor prompts to cache: a JSONL file with "prompt", or "default" for the '
            'package\'s. Unset with --positions none: "default".'
        ),
    ] = None,
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option(help="Arguments of the chat template for the anchors: a JSON object."),
    ] = None,
    answer_start: Annotated[
        str | None, typer.Option(help="Text between an anchor's prompt and its answer.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help=f"Kind of the penalty: {', '.join(get_args(PenaltyKind))}. Unset: coarse_kl at "
            "anchors alone, mse on rows."
        ),
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a row; as in training.")] = 1024,
    dtype: Annotated[
        str, typer.Option(help=f"Dtype of the stored values: {', '.join(DTYPES)}.")
    ] = "float32",
    model_dtype: _MODEL_DTYPE = "auto",
    rows_per_shard: Annotated[int, typer.Option(min=1, help="Rows of one file.")] = 256,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of one forward, padding included.")
    ] = 4096,
    path: Annotated[str, typer.Option(help="linear, or logits, as in attach.")] = "linear",
    backend: Annotated[str, typer.Option(help=f"One of {', '.join(get_args(Backend))}.")] = "auto",
    overwrite: Annotated[bool, typer.Option(help="Replace a cache of another plan.")] = False,
    as_json: JSON_OPTION = False,
) -> None:
    """Compute MODEL's safety logits once, at the anchors and on DATA, and store them.

    If it is interrupted, run the same command again: it resumes and writes the same files.
    """
    with readable_errors():
        with needs_integrations():
            from ..integrations.models import read_positions
            from ..integrations.reference_cache import build_cache
        if dtype not in DTYPES:  # before the model is loaded
            raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}; got {dtype!r}")
        with progress(quiet=as_json) as watch:
            report = build_cache(
                model,
                data,
                output,
                positions=read_positions(positions),
                kind=kind,
                safety_tokens=safety_tokens,
                templates=templates,
                anchors=anchors,
                chat_template_kwargs=read_json_object("chat_template_kwargs", chat_template_kwargs),
                answer_start=answer_start,
                max_length=max_length,
                model_dtype=model_dtype,
                progress=lambda text: watch(text, 0, 1),
                dtype=dtype,
                rows_per_shard=rows_per_shard,
                batch_tokens=batch_tokens,
                path=path,
                backend=backend,
                overwrite=overwrite,
                on_tokens=lambda done, total: watch("reference pass, tokens", done, total),
            )
    if as_json:
        print_json({**asdict(report), "folder": str(report.folder)})
        return
    console = Console()
    for line in report.rebuilt:
        console.print(f"[yellow]Built again:[/] {escape(line)}", soft_wrap=True)
    console.print(
        f"{report.rows:,} rows ({report.duplicates:,} were there twice), {report.tokens:,} tokens "
        f"in {report.shards:,} shards, {report.kept:,} of them from an earlier run; "
        f"{report.computed_tokens:,} tokens computed in {report.seconds:.1f} s",
        soft_wrap=True,
    )
    day = read_plan(report.folder).made_with.get(DATED)
    if day is not None:
        told = f"the chat template writes the day into the rows, {day}: {OF_A_DAY}."
        console.print(f"[yellow]Note:[/] {escape(told)}", soft_wrap=True)
    console.print(f"Written to {escape(str(output))}", soft_wrap=True)


@app.command(cls=Command)
def verify(
    folder: _FOLDER,
    model: Annotated[
        str | None, typer.Option(help="Compare with this model's weights too.")
    ] = None,
    model_dtype: _MODEL_DTYPE = "auto",
    as_json: JSON_OPTION = False,
) -> None:
    """Read every byte of FOLDER and compare it with its checksums.

    Exits with 1 if anything is broken, and names each shard that is.
    """
    with readable_errors():
        if model is None:
            broken = verify_cache(folder)
        else:
            with needs_integrations():
                from ..integrations.reference_cache import verify_cache_of
            with progress(quiet=as_json) as watch:
                broken = verify_cache_of(
                    folder,
                    model,
                    model_dtype=model_dtype,
                    on_shard=lambda done, total: watch("verify, shards", done, total),
                    progress=lambda text: watch(text, 0, 1),
                )
    if as_json:
        print_json({"folder": str(folder), "whole": not broken, "broken": broken})
    else:
        console = Console()
        for line in broken:
            console.print(f"[bold red]broken:[/] {escape(line)}", soft_wrap=True)
        if not broken:
            console.print(f"{escape(str(folder))} is whole", soft_wrap=True)
    if broken:
        raise typer.Exit(1)


@app.command(cls=Command)
def info(folder: _FOLDER, as_json: JSON_OPTION = False) -> None:
    """Show what FOLDER holds, and how much time it saves.

    The reference's forward was timed when the cache was built, the look-up is timed now. Building
    a cache pays off after forward / (forward - look-up) epochs.
    """
    with readable_errors():
        found = _info(folder)
    if as_json:
        print_json(found)
        return
    table = Table("", "", title=escape(str(folder)), show_header=False)
    for name, value in found.items():
        if name != "made_with":
            label = name.replace("_", " ").replace(" seconds per 1000", ", s / 1,000")
            table.add_row(label, _text(value))
    table.add_row("made with", ", ".join(f"{k} {v}" for k, v in found["made_with"].items()))
    Console().print(table)


def _info(folder: Path) -> dict[str, Any]:
    """Return what a cache holds; times that were not stored are None."""
    cached = CachedReference(folder)
    plan = cached.plan
    size = sum(path.stat().st_size for path in folder.iterdir())
    tokens, seconds = cached.measure_look_up(_TIMED_TOKENS)
    look_up = 1000 * seconds / tokens
    timed, passes = read_timings(folder)
    ref = 1000 * passes / timed if timed else None
    saved = None if ref is None else ref - look_up
    return {
        "rows": plan.rows,
        "tokens": plan.tokens,
        "ids": plan.ids,
        "values": plan.values,
        "dtype": plan.dtype,
        "bytes": size,
        "bytes_per_token": size / plan.tokens,
        "model": plan.model,
        "safety_tokens": plan.safety_tokens,
        "reference_pass_seconds_per_1000_tokens": ref,
        "look_up_seconds_per_1000_tokens": look_up,
        "saved_seconds_per_1000_tokens": saved,
        "epochs_until_building_pays": (
            ref / saved if ref is not None and saved is not None and saved > 0 else None
        ),
        "made_with": plan.made_with,
    }


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else escape(str(value))
