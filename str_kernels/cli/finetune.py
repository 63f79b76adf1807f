"""str-kernels finetune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..checks import read_json_object
from ..contracts import Backend, PenaltyKind
from .console import (
    JSON_OPTION,
    SAFETY_TOKENS_OPTION,
    TEMPLATES_OPTION,
    import_integration,
    print_json,
    progress,
    readable_errors,
)

_KINDS, _BACKENDS = get_args(PenaltyKind), get_args(Backend)


def finetune(
    model: Annotated[str, typer.Argument(help="'builtin', a folder, or a hub id.")],
    data: Annotated[
        Path, typer.Argument(help="JSONL: chat messages, or prompt and completion, per row.")
    ],
    output: Annotated[Path, typer.Option(help="Folder to make.")] = Path("str-kernels-run"),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of one forward.")] = 8,
    accumulation: Annotated[int, typer.Option(min=1, help="Forwards of one step.")] = 1,
    learning_rate: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 2e-4,
    warmup: Annotated[int, typer.Option(min=0, help="Steps until the peak.")] = 0,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 1024,
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 8,
    lora_alpha: Annotated[int | None, typer.Option(help="Scale; twice the rank if unset.")] = None,
    lora_dropout: Annotated[float, typer.Option(help="Dropout inside the adapters.")] = 0.0,
    weight: Annotated[
        float | None,
        typer.Option(help="Of the penalty, 0.1 if unset; 0 is plain fine-tuning."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help=f"Of penalty: {', '.join(_KINDS)}. Unset: coarse_kl at anchors, mse on rows."
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="T of kind subset_kl.")] = 1.0,
    delta: Annotated[float, typer.Option(help="Of kind huber, logits.")] = 1.0,
    positions: Annotated[
        str,
        typer.Option(
            help="Of the penalty on the rows: 'none' (anchors alone), 'response' (the paper's "
            "form), 'all', or the first m labels of each response."
        ),
    ] = "none",
    safety_tokens: SAFETY_TOKENS_OPTION = None,
    templates: TEMPLATES_OPTION = None,
    anchors: Annotated[
        str | None,
        typer.Option(
            help="Prompts without answers at which the model is held in each step: a JSONL file, "
            "or 'default' for those that come with the package."
        ),
    ] = None,
    anchors_per_step: Annotated[int, typer.Option(min=0, help="Harmful ones in a step.")] = 2,
    harmless_anchors_per_step: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Harmless ones in a step, which hold over-refusal down; 2 if unset, or as many as "
            "there are.",
        ),
    ] = None,
    anchor_penalty_weight: Annotated[
        float | None,
        typer.Option(help="Of the penalty at the anchors, by itself; --weight if unset."),
    ] = None,
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option(
            help='Of the chat template, for the anchors: JSON, as {"enable_thinking": false}.'
        ),
    ] = None,
    answer_start: Annotated[
        str | None, typer.Option(help="Text between an anchor's prompt and its answer.")
    ] = None,
    anchor_weight: Annotated[float | None, typer.Option(hidden=True)] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="A folder made by `cache build`, instead of the reference's passes."),
    ] = None,
    ref_every: Annotated[
        int, typer.Option(min=1, help="Ask the reference in every n-th forward only.")
    ] = 1,
    ref_tokens: Annotated[
        int | None, typer.Option(min=1, help="The reference reads so many first tokens only.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    backend: Annotated[str, typer.Option(help=f"One of {', '.join(_BACKENDS)}.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of adapters, order and dropout.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder.")] = False,
    as_json: JSON_OPTION = False,
) -> None:
    """Fine-tune MODEL on DATA with LoRA and the safety loss.

    Writes the adapter, safety_tokens.json, report.json and curves.png into the output folder.
    """
    with readable_errors():
        integration = import_integration("finetune")
        training = import_integration("training")
        positions_module = import_integration("positions")
        if anchor_weight is not None:
            raise ValueError(
                "`--anchor-weight` must be left out: it was relative to --weight. Give "
                "--anchor-penalty-weight, the anchors' weight by itself"
            )
        where = positions_module.read_positions(positions)
        positions_module.check_anchor_options(
            where == "none",
            where == "none" or anchors is not None,
            weight=weight,
            anchor_penalty_weight=anchor_penalty_weight,
            harmless_anchors_per_step=harmless_anchors_per_step,
            chat_template_kwargs=chat_template_kwargs,
            answer_start=answer_start,
        )

        options = training.TrainingOptions(
            steps=steps,
            batch_size=batch_size,
            accumulation=accumulation,
            learning_rate=learning_rate,
            warmup=warmup,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            seed=seed,
            positions=where,
            ref_every=ref_every,
            ref_tokens=ref_tokens,
            backend=backend,
        )
        held = None
        if anchors is not None or where == "none":
            held = integration.AnchorOptions(
                anchors or "default",
                anchors_per_step,
                harmless_anchors_per_step,
                anchor_penalty_weight,
                read_json_object("chat_template_kwargs", chat_template_kwargs),
                answer_start,
            )
        with progress(quiet=as_json) as watch:
            result = integration.finetune(
                model,
                data,
                output,
                options=options,
                penalty=positions_module.chosen_penalty(where, weight, kind, temperature, delta),
                safety_tokens=safety_tokens,
                templates=templates,
                anchors=held,
                cache=cache,
                max_length=max_length,
                dtype=dtype,
                overwrite=overwrite,
                on_step=lambda step: watch("fine-tune", step, steps),
                progress=lambda text: watch(text, 0, 1),
            )
    if as_json:
        print_json({"folder": str(result.folder), **result.report})
    else:
        _show_finetune(result)


def _show_finetune(result: Any) -> None:
    first, last = result.report["log"][0], result.report["log"][-1]
    table = Table("", "first step", "last step", title=f"{result.report['options']['steps']} steps")
    names = ("loss", "safety/ce", "safety/penalty", "safety/anchor_penalty", "safety/max_drift")
    for name in (name for name in names if name in first):
        table.add_row(name, f"{first[name]:.4f}", f"{last[name]:.4f}")
    console = Console()
    console.print(table)
    console.print(
        f"Written to {escape(str(result.folder))}: adapter, safety_tokens.json, "
        "report.json, curves.png",
        soft_wrap=True,
    )
