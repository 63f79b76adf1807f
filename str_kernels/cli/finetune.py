"""str-kernels finetune."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..attach_options import SETTINGS
from .console import (
    JSON_OPTION,
    needs_integrations,
    print_json,
    progress,
    readable_errors,
)

_DTYPES = "auto|float32|bfloat16|float16"
_TRAINING, _DATA = "How to train", "What to train on"
_SAFETY, _ANCHORS, _RUN = "Safety penalty", "Anchor prompts", "The run"
_NOT_OPTIONS = ("ctx", "config", "as_json")


def _option(panel: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **{"show_default": False, **more})


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Add a flag for each of SETTINGS to a command's signature, where typer reads them."""
    signature = inspect.signature(command, eval_str=True)
    own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    flags = [
        inspect.Parameter(
            one.flag,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,  # not given; SafetySettings has the default
            annotation=Annotated[
                one.annotation | None,
                _option(
                    _ANCHORS if one.of_anchors else _SAFETY,
                    one.help,
                    metavar="|".join(one.values) if one.values else None,
                    show_default=False if one.default is None else str(one.default),
                    hidden=one.hidden,
                ),
            ],
        )
        for one in SETTINGS
    ]
    vars(command)["__signature__"] = signature.replace(parameters=[*own, *flags])
    return command


@_with_settings
def finetune(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(help="'builtin', a folder of a model or an adapter, or a hub id."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Argument(
            help="Rows of messages, prompt and completion, text, ShareGPT or Alpaca: a .jsonl, "
            ".json, .csv or .parquet file, a saved data set, or a hub id."
        ),
    ] = None,
    output: Annotated[
        str | None, _option(_RUN, "Folder to make; str-kernels-run if unset.")
    ] = None,
    config: Annotated[
        Path | None, _option(_RUN, "A YAML file of these options and all of TRL's.")
    ] = None,
    steps: Annotated[
        int | None, _option(_TRAINING, "Optimizer steps, 100 if unset.", min=1)
    ] = None,
    epochs: Annotated[
        float | None, _option(_TRAINING, "Passes through DATA, instead of steps.")
    ] = None,
    batch_size: Annotated[
        int | None, _option(_TRAINING, "Rows of one forward, 8 if unset.", min=1)
    ] = None,
    accumulation: Annotated[
        int | None, _option(_TRAINING, "Forwards of one step, 1 if unset.", min=1)
    ] = None,
    lr: Annotated[
        float | None, _option(_TRAINING, "Peak learning rate; 2e-4, or 2e-5 with --full.")
    ] = None,
    warmup: Annotated[
        int | None, _option(_TRAINING, "Steps until the peak learning rate.", min=0)
    ] = None,
    lora_rank: Annotated[
        int | None, _option(_TRAINING, "Rank of the adapters, 8 if unset.", min=1)
    ] = None,
    lora_alpha: Annotated[
        int | None, _option(_TRAINING, "Scale of the adapters, twice the rank if unset.")
    ] = None,
    lora_dropout: Annotated[
        float | None, _option(_TRAINING, "Dropout inside the adapters.")
    ] = None,
    full: Annotated[
        bool, _option(_TRAINING, "Train every weight. A frozen copy is the reference.", "--full")
    ] = False,
    load_in_4bit: Annotated[
        bool, _option(_TRAINING, "QLoRA, with bitsandbytes.", "--load-in-4bit")
    ] = False,
    checkpointing: Annotated[
        bool,
        _option(_TRAINING, "Gradient checkpointing: less memory, more time.", "--checkpointing"),
    ] = False,
    long_context: Annotated[
        bool,
        _option(
            _TRAINING,
            "For long rows: checkpointing, one row a forward and 8 forwards a step, and rows as "
            "long as the model takes. Each can be overridden, as by --no_gradient_checkpointing.",
            "--long-context",
        ),
    ] = False,
    packing: Annotated[
        bool, _option(_TRAINING, "Pack rows to the full length.", "--packing")
    ] = False,
    dtype: Annotated[
        str | None,
        _option(_TRAINING, "Dtype of the weights; as stored if unset.", metavar=_DTYPES),
    ] = None,
    seed: Annotated[
        int | None, _option(_TRAINING, "Random seed of adapters, order of rows and dropout.")
    ] = None,
    max_length: Annotated[
        int | None, _option(_DATA, "Tokens of a row, 1024 if unset; longer ones are cut.", min=2)
    ] = None,
    data_split: Annotated[
        str | None, _option(_DATA, "Which split of DATA to use; 'train' if unset.")
    ] = None,
    eval_data: Annotated[
        str | None, _option(_DATA, "Rows for evaluation, in the same formats as DATA.")
    ] = None,
    eval_fraction: Annotated[
        float | None, _option(_DATA, "Fraction of DATA to draw for evaluation instead.")
    ] = None,
    early_stopping: Annotated[
        int | None,
        _option(_DATA, "Stop after this many evaluations without a better loss.", min=1),
    ] = None,
    eval_refusals: Annotated[
        int | None,
        _option(_RUN, "Ask this many harmful and harmless probes before and after.", min=1),
    ] = None,
    dry_run: Annotated[bool, _option(_RUN, "Print the plan, train nothing.", "--dry-run")] = False,
    resume: Annotated[bool, _option(_RUN, "Resume an unfinished run.", "--resume")] = False,
    overwrite: Annotated[bool, _option(_RUN, "Replace a run's folder.", "--overwrite")] = False,
    keep_checkpoints: Annotated[
        bool, _option(_RUN, "Keep the checkpoints of a finished run.", "--keep-checkpoints")
    ] = False,
    as_json: JSON_OPTION = False,
    **of_the_loss: Any,  # SETTINGS, by their flags
) -> None:
    """Fine-tune MODEL on DATA with the safety loss, using TRL's SFTTrainer.

    Writes the adapter, the tokenizer, safety_tokens.json, report.json, curves.png and a model card
    into the output folder. All other options of TRL's SFTConfig and ModelConfig also work, after
    MODEL and DATA: `--optim`, `--weight-decay`, `--report-to`, `--use-dora` and so on.
    """
    # Read by torch at its first tensor. Large blocks are then aligned to pages, and glibc returns
    # more of the memory that a step frees (docs/long-context.md).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    given = {
        name: value
        for name, value in ctx.params.items()
        if name not in _NOT_OPTIONS and value is not None and value is not False
    }
    stopped: int | None = None
    with readable_errors():
        with needs_integrations():
            from ..integrations.finetune import Stopped, is_main, read_options, short_names
            from ..integrations.finetune import dry_run as plan_run
            from ..integrations.finetune import finetune as run_finetune
        more = _places(given, config is not None) + ctx.args
        with short_names():
            options = read_options(given, more, config)
            silent = as_json or not is_main(options)
            with progress(quiet=silent) as watch:
                say = lambda text: watch(text, 0, 1)  # noqa: E731
                if options.run.dry_run:
                    plan = plan_run(options, progress=say)
                else:
                    try:
                        result = run_finetune(
                            options,
                            on_step=lambda step, total: watch("fine-tune", step, total),
                            progress=say,
                        )
                    except Stopped as error:
                        stopped, reason = error.number, str(error)
    if stopped is not None:
        _say_stopped(reason, stopped, as_json and is_main(options), silent)
        raise typer.Exit(128 + stopped)
    if options.run.dry_run:
        print_json(plan) if as_json else _show_plan(plan)
    elif as_json and is_main(options):
        print_json({"folder": str(result.folder), **result.report})
    elif not silent:
        _show_finetune(result)


def _places(given: dict[str, Any], in_config: bool) -> list[str]:
    """Remove TRL options that were parsed as MODEL and DATA from `given`, and return them."""
    places = [str(given[name]) for name in ("model", "data") if name in given]
    if not any(place.startswith("--") for place in places):
        return []
    if not in_config or not places[0].startswith("--"):
        raise ValueError("MODEL and DATA must come before other options")
    for name in ("model", "data"):
        given.pop(name, None)
    return places


def _say_stopped(reason: str, number: int, as_json: bool, silent: bool) -> None:
    if as_json:
        print_json({"stopped_by": number, "reason": reason})
    elif not silent:
        text = f"stopped by {reason}; the same command with --resume goes on"
        Console(stderr=True).print(text, soft_wrap=True)


def _show_plan(plan: dict[str, Any]) -> None:
    console = Console()
    table = Table("", "", title="Plan, nothing was trained", show_header=False)
    for name, value in plan.items():
        if name not in ("first_row", "notes"):
            table.add_row(name.replace("_", " "), escape(str(value)))
    console.print(table)
    for note in plan["notes"]:
        console.print(f"note: {escape(note)}", soft_wrap=True)
    console.print("the first row, what is learnt between >>> and <<<:", soft_wrap=True)
    console.print(escape(plan["first_row"]), soft_wrap=True, highlight=False)


def _show_finetune(result: Any) -> None:
    report = result.report
    first, last = (report["log"][place] if report["log"] else {} for place in (0, -1))
    table = Table("", "first step", "last step", title=f"{report['steps']} steps")
    names = ("loss", "safety/ce", "safety/penalty", "safety/anchor_penalty", "safety/max_drift")
    for name in (name for name in names if first.get(name) is not None):
        table.add_row(name, f"{first[name]:.4f}", f"{last[name]:.4f}")
    console = Console()
    console.print(table)
    if report["refusals"]:
        refused = Table("refused", "harmful", "harmless")
        for when, counts in report["refusals"].items():
            refused.add_row(when, *(counts[kind]["text"] for kind in ("harmful", "harmless")))
        console.print(refused)
    for note in report["notes"]:
        console.print(f"note: {escape(note)}", soft_wrap=True)
    what = "adapter" if report["adapter"] else "model"
    console.print(
        f"Written to {escape(str(result.folder))}: {what}, tokenizer, safety_tokens.json, "
        "report.json, curves.png, README.md",
        soft_wrap=True,
    )
