"""str-kernels plan."""

from __future__ import annotations

import math
import shlex
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .console import JSON_OPTION, needs_integrations, print_json, progress, readable_errors

_GIB = 1 << 30
_WAYS = {
    "own": "the model's own loss, no STR",
    "by_hand": "STR by hand, all logits twice",
    "chunked": "STR in a PyTorch loop",
    "ours": "str-kernels",
}


def plan(
    model: Annotated[
        str, typer.Argument(help="'builtin', a config.json or the folder of one, or a hub id.")
    ],
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 1024,
    batch_size: Annotated[
        int, typer.Option("--batch", "--batch-size", min=1, help="Rows of one forward.")
    ] = 8,
    accumulation: Annotated[int, typer.Option(min=1, help="Forwards of one step.")] = 1,
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 8,
    full: Annotated[bool, typer.Option("--full", help="Train every weight, no adapters.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--checkpointing",
            "--gradient-checkpointing",
            help="Gradient checkpointing: less memory, more time.",
        ),
    ] = False,
    attention: Annotated[str, typer.Option(help="auto, sdpa or eager.")] = "auto",
    reference: Annotated[
        str,
        typer.Option(
            help="none: the penalty at anchors alone, the default of `finetune`; live: one more "
            "forward for each batch; cached: logits from `cache build`."
        ),
    ] = "none",
    padding: Annotated[
        bool | None,
        typer.Option(
            help="Rows differ in length, so attention needs a mask. Unset: yes in batches of more "
            "than one row."
        ),
    ] = None,
    ids: Annotated[int, typer.Option(min=1, help="Safety tokens K.")] = 96,
    memory: Annotated[
        float | None, typer.Option(help="Available GiB: also shows the longest rows that fit.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu or cuda, which determines the chunk size of the loss.")
    ] = "cuda",
    as_json: JSON_OPTION = False,
) -> None:
    """Plan the memory of fine-tuning MODEL, from its config alone.

    Reads no weights: runs a training step on tensors without values and counts their memory.
    """
    with readable_errors():
        with needs_integrations():
            from ..integrations.plan import PlanOptions, plan_of, read_config
        options = PlanOptions(
            tokens=tokens,
            batch_size=batch_size,
            accumulation=accumulation,
            lora_rank=None if full else lora_rank,
            dtype=dtype,
            checkpointing=checkpointing,
            attention=attention,
            reference=cast(Any, reference),  # PlanOptions checks it
            padding=padding,
            ids=ids,
            device=device,
        )
        if memory is not None and not 0 < memory < math.inf:
            raise ValueError(f"`--memory` must be > 0, in GiB; got {memory:g}")
        room = None if memory is None else int(memory * _GIB)
        with progress(quiet=as_json) as watch:
            config = read_config(model)
            found = plan_of(
                config, options, memory=room, progress=lambda *done: watch("plan", *done)
            )
    line = _command(model, found)
    if as_json:
        print_json({"model": model, **found.as_dict(), "command": line})
    else:
        _show(model, found, line)


def _command(model: str, found: Any) -> str | None:
    """Return the command that fine-tunes with these options; None if nothing fits."""
    options, longest = found.options, found.ways["ours"].longest
    tokens = options.tokens if longest is None else min(options.tokens, longest)
    if tokens < 2:
        return None
    words = ["str-kernels", "finetune", model, "DATA", "--output", "run"]
    words += ["--max-length", str(tokens), "--batch-size", str(options.batch_size)]
    if options.accumulation > 1:
        words += ["--accumulation", str(options.accumulation)]
    if options.lora_rank is None:
        words.append("--full")
    else:
        words += ["--lora-rank", str(options.lora_rank)]
    if options.dtype != "auto":
        words += ["--dtype", options.dtype]
    if options.checkpointing:
        words.append("--checkpointing")
    if options.attention != "auto":
        words += ["--attention", options.attention]
    if options.reference != "none":
        words += ["--positions", "response"]
    if options.reference == "cached":
        words += ["--cache", "CACHE"]
    return shlex.join(words)


def _show(model: str, found: Any, line: str | None) -> None:
    options = found.options
    trained = "all weights" if options.lora_rank is None else f"LoRA r = {options.lora_rank}"
    console = Console()
    # above the first table and not its title, which would be broken at that table's width
    console.print(f"{escape(model)}, {found.dtype}, {trained}", soft_wrap=True, highlight=False)
    between = Table("held", "GiB")
    parts = {
        "weights": found.weights,
        "weights of the reference": found.reference_weights,
        "optimizer's state": found.optimizer,
        "gradients": found.gradients,
        "activations": found.activations,
    }
    for name, size in parts.items():
        if size:
            between.add_row(name, _gib(size))
    title = f"{options.batch_size} x {options.tokens:,} tokens, reference {options.reference}"
    table = Table("loss", title=title)
    for heading in ("of the\nloss", "reference's\nlogits", "a step", "peak"):
        table.add_column(heading, justify="right")
    if found.memory is not None:
        table.add_column(f"longest in\n{found.memory / _GIB:g} GiB", justify="right")
    for way, takes in found.ways.items():
        cells = [_gib(x) for x in (takes.loss, takes.reference, takes.step, takes.peak)]
        if takes.longest is not None:
            end = " (all)" if takes.longest == found.positions else ""
            cells.append(f"{takes.longest:,}{end}")
        table.add_row(_WAYS[way], *cells)
    console.print(between)
    console.print(table)
    console.print(
        "GiB of tensors, by a step without values; a CUDA context and what an allocator keeps are "
        "not counted (docs/plan.md).",
        soft_wrap=True,
    )
    if line is not None:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    else:
        console.print("Not even rows of two tokens fit.")


def _gib(size: int) -> str:
    return f"{size / _GIB:,.2f}"
