"""`str-kernels finetune`: a model, a data file, LoRA with the safety loss, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..atomic import replacing_folder, write_json
from ..contracts import SafetyPenalty
from ..reference_cache import CachedReference
from ..safety_tokens import SafetyTokens
from .anchors import AnchorPrompts
from .chat_data import encode_examples, read_examples
from .figures import draw_curves
from .loading import load_model
from .positions import check_positions
from .training import TrainingOptions, train_lora

REPORT = "report.json"


@dataclass(frozen=True)
class AnchorOptions:
    """Which anchors to hold, as in AnchorPrompts.from_prompts.

    Args:
        prompts: a JSON Lines file or the name of a set that comes with the package.
        per_step: harmful ones in each step.
        harmless_per_step: harmless ones; 2 when None, or as many as there are.
        penalty_weight: of the penalty at the anchors, by itself; the penalty's own when None.
        chat_template_kwargs: of the chat template.
        answer_start: the text between a prompt and its answer.
    """

    prompts: str = "default"
    per_step: int = 2
    harmless_per_step: int | None = None
    penalty_weight: float | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    answer_start: str | None = None


@dataclass(frozen=True)
class FinetuneResult:
    """Where a run's files are, and its report."""

    folder: Path
    report: dict[str, Any]


def finetune(
    model_name: str,
    data: Path,
    output: Path,
    *,
    options: TrainingOptions,
    penalty: SafetyPenalty,
    safety_tokens: Path | None = None,
    templates: Path | None = None,
    anchors: AnchorOptions | None = None,
    cache: Path | None = None,
    max_length: int = 1024,
    dtype: str = "auto",
    overwrite: bool = False,
    on_step: Callable[[int], None] | None = None,
    progress: Callable[[str], None] | None = None,
) -> FinetuneResult:
    """Fine-tune a model with LoRA and the safety loss, and write everything into one folder.

    The folder holds the adapter (safetensors), safety_tokens.json, report.json and curves.png. It
    is made under a temporary name and renamed when complete, so it is whole or absent.

    Args:
        model_name: "builtin", a folder or a hub id.
        data: JSONL file of chat messages or prompt/completion rows.
        output: the folder to make.
        options: length, rate and size.
        penalty: kind and weight.
        safety_tokens: a file written by SafetyTokens.save; its tokenizer must be the model's.
        templates: a text file of refusal templates, one per line, instead of the built-in ones.
        anchors: prompts at which the model is held in each step; the package's when None and
            the penalty has no other place.
        cache: a reference cache of the same model, data, tokens and anchors, instead of the
            reference's passes.
        max_length: longer rows lose their end, tokens.
        dtype: of the frozen weights.
        overwrite: replace `output` if it exists.
        on_step: called with the number of optimizer steps done.
        progress: called with a line of text when something takes seconds.

    Returns:
        The folder and the report.

    Raises:
        ValueError: the input is bad; nothing has been written.
    """
    if output.exists() and not overwrite:
        raise ValueError(f"`output` must not exist unless overwrite is set; got {output}")
    if safety_tokens is not None and templates is not None:
        raise ValueError("`templates` must not be given together with `safety_tokens`; got both")
    if max_length < 2:
        raise ValueError(f"`max_length` must be >= 2; got {max_length}")
    check_positions(options.positions)
    examples = read_examples(data)  # before anything slow
    cached = None if cache is None else CachedReference(cache)
    model, tokenizer = load_model(model_name, dtype=dtype, progress=progress)
    if safety_tokens is not None:
        tokens = SafetyTokens.load(safety_tokens, tokenizer)
    else:
        tokens = SafetyTokens.from_templates(tokenizer, templates)
    rows = encode_examples(tokenizer, examples, max_length)
    held = None
    if anchors is None and options.positions == "none":
        anchors = AnchorOptions()
    if anchors is not None:
        held = AnchorPrompts.from_prompts(tokenizer, **vars(anchors), seed=options.seed)
    peft_model, log = train_lora(
        model,
        tokenizer,
        rows,
        tokens,
        penalty,
        options,
        anchors=held,
        reference=cached,
        on_step=on_step,
    )
    report = {
        "schema_version": 1,
        "model": model_name,
        "data": {"file": data.name, "rows": len(rows)},
        "options": asdict(options),
        "penalty": {
            "kind": penalty.kind,
            "weight": float(penalty.weight),
            "temperature": penalty.temperature,
            "delta": penalty.delta,
        },
        "anchors": held
        and {**vars(anchors), "harmless_per_step": held.harmless_per_step, "rows": len(held)},
        "cache": None if cache is None else cache.name,
        "safety_tokens": {"count": len(tokens), "source": tokens.source},
        "torch": torch.__version__,
        "log": log,
    }
    with replacing_folder(output) as folder:
        peft_model.save_pretrained(folder)
        tokens.save(folder / "safety_tokens.json")
        draw_curves(log, folder / "curves.png")
        write_json(folder / REPORT, report)
    return FinetuneResult(output, report)
