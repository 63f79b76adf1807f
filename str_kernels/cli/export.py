"""str-kernels export."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from .console import JSON_OPTION, needs_integrations, print_json, progress, readable_errors


def export(
    run: Annotated[str, typer.Argument(help="A folder with an adapter, such as finetune's.")],
    output: Annotated[Path, typer.Option(help="Folder of the model to make.")],
    dtype: Annotated[
        str,
        typer.Option(help="To write: auto (that of the base), float32, bfloat16 or float16."),
    ] = "auto",
    overwrite: Annotated[
        bool, typer.Option(help="Replace the output folder, if this command made it.")
    ] = False,
    as_json: JSON_OPTION = False,
) -> None:
    """Merge the adapter of RUN into its base and write a full model.

    Writes safetensors, tokenizer and generation config, for any program that can load the base.
    Compares the model's logits with the adapter's before the folder gets its final name.
    """
    with readable_errors():
        with needs_integrations():
            from ..integrations.export import export as export_model
        with progress(quiet=as_json) as watch:
            result = export_model(
                run,
                output,
                dtype=dtype,
                overwrite=overwrite,
                progress=lambda text: watch(text, 0, 1),
            )
    if as_json:
        print_json({**asdict(result), "folder": str(result.folder)})
    else:
        _show(result)


def _show(result: Any) -> None:
    console = Console(highlight=False)
    console.print(
        f"{result.base} with its adapter, {result.parameters:,} parameters in {result.dtype}",
        markup=False,
        soft_wrap=True,
    )
    if result.untied:
        console.print(
            "Embedding and head share no weight any more: the adapter moved them apart.",
            soft_wrap=True,
        )
    console.print(
        f"Logits on {result.prompts} prompts, largest differences: {result.adapter_effect:.3g} "
        f"between base and adapter, {result.merge_difference:.3g} between adapter and merged "
        f"model, {result.written_difference:.3g} once written in {result.dtype}",
        soft_wrap=True,
    )
    if result.rounded_away:
        console.print(
            f"[yellow]Rounding to {result.dtype} takes more than a tenth of what the adapter does; "
            "--dtype float32 keeps it.[/]",
            soft_wrap=True,
        )
    console.print(f"Written to {escape(str(result.folder))}", soft_wrap=True)
