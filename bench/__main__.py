"""The benchmarks' command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from str_kernels.atomic import write_json

from .speed import HEADS, PROTOCOL, measure

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Benchmarks of str-kernels. Every provider is checked against eager before it is timed."""


@app.command()
def speed(
    head: Annotated[str, typer.Option(help=f"One of {', '.join(HEADS)}.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Rows N.")] = 2048,
    ids: Annotated[int, typer.Option(min=1, help="Safety ids K.")] = 64,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    train_head: Annotated[bool, typer.Option(help="Make the head's gradient too.")] = False,
    pairs: Annotated[int, typer.Option(min=1, help="Interleaved repetitions.")] = 15,
    save: Annotated[Path | None, typer.Option(help="Also write the rows here as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows as JSON only.")] = False,
) -> None:
    """Time the linear path, forward and backward, against eager and the bare products."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    head = head or ("llama-3" if device == "cuda" else "smollm2")
    if head not in HEADS:
        raise typer.BadParameter(f"`head` must be one of {', '.join(HEADS)}; got {head!r}")
    rows = measure(HEADS[head], tokens, ids, getattr(torch, dtype), train_head, pairs, device)
    rows = [{"head": head, **row} for row in rows]
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        write_json(save, rows)
    if as_json:
        json.dump(rows, sys.stdout, indent=2)
        sys.stdout.write("\n")
        return
    first = rows[0]
    table = Table(
        title=f"{head}: N {tokens}, D {first['D']}, V {first['V']}, K {ids}, {dtype}, "
        f"{'trainable' if train_head else 'frozen'} head, {first['device']}"
    )
    for name in (
        "provider",
        "median\nms",
        "quartiles\nms",
        "against\neager",
        "extra\nMB",
        "gradient\nerror",
    ):
        table.add_column(name, justify="left" if name == "provider" else "right", no_wrap=True)
    for row in rows:
        memory = row["extra_memory_bytes"]
        table.add_row(
            row["provider"],
            f"{row['median_ms']:.0f}",
            f"{row['quartiles_ms'][0]:.0f}-{row['quartiles_ms'][1]:.0f}",
            f"{row['against_eager']:.2f} x",
            "" if memory is None else f"{memory / 1e6:,.0f}",
            "" if row["gradient_error"] is None else f"{row['gradient_error']:.1e}",
        )
    console = Console()
    console.print(table)
    console.print(PROTOCOL.format(pairs=pairs))
    console.print(f"torch {first['torch']}, triton {first['triton']}")


if __name__ == "__main__":
    app()
