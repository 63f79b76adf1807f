"""What a run writes about itself: the report, the model card, the plan of a dry run."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from jinja2 import Environment

from ...evals import evaluate_refusals, load_prompts, printable
from ...op import IGNORE_INDEX
from ..chat import answer_prompts
from ..plan import PlanOptions, plan_of

REPORT = "report.json"
_ANSWER_TOKENS = 32
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FREE = {"output_dir", "report_to", "run_name", "disable_tqdm", "save_total_limit", "log_level"} | {
    "log_level_replica",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "include_for_metrics",
    "project",
    "trackio_space_id",
    "torch_empty_cache_steps",
    "skip_memory_metrics",
    "local_rank",
}  # options that may change when a run is resumed
_PROBES = {"harmful": "harmful_probes", "harmless": "benign_probes"}
_CARD = """\
---
{% if on_hub -%}
base_model: {{ report.model }}
{% endif -%}
library_name: {{ "peft" if report.adapter else "transformers" }}
pipeline_tag: text-generation
tags: [str-kernels, sft{{ ", safety-token-regularization" if holds }}{{ ", lora" if lora }}]
---

# {{ report.model }}, fine-tuned{{ " with its refusals held" if holds }}

Made by str-kernels {{ report.version }} from
{{ report.data.rows }} rows of `{{ report.data.name }}`, {{ report.steps }} steps.

What was held: {{ held }}.{{ " The reference is " + report.reference + "." if holds }}
{% if report.refusals %}
Refused, of {{ asked }} prompts each (greedy, {{ tokens }} tokens, by how an answer opens; 95 %
Wilson intervals):

| | harmful | harmless |
| --- | ---: | ---: |
{% for when, counts in report.refusals.items() -%}
| {{ when }} | {{ counts.harmful.text }} | {{ counts.harmless.text }} |
{% endfor %}{% else %}
Nobody has counted its refusals here: `str-kernels eval run` does.
{% endif %}
Losses are in report.json, the tokens in safety_tokens.json. That few refusals were lost does not
mean that none were: test before use.
"""


def describe(
    options: Any,
    ready: Any,
    trainer: Any,
    refusals: dict[str, Any],
) -> dict[str, Any]:
    """Return the report of a finished run; numbers that are not finite become null.

    Args:
        options: the run's FinetuneOptions.
        ready: the run's Prepared.
        trainer: the trainer, after train().
        refusals: results of `probe_refusals` before and after training.

    Returns:
        The content of report.json.
    """
    penalty = trainer.attach_options.get("penalty")
    anchors = trainer.attach_options.get("anchors")
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    report: dict[str, Any] = {
        "schema_version": 2,
        "version": version("str-kernels"),
        "torch": torch.__version__,
        "model": options.model.model_name_or_path,
        "adapter": hasattr(trainer.model, "peft_config"),
        "dtype": str(next(trainer.model.parameters()).dtype).removeprefix("torch."),
        "reference": _reference(trainer.attach_options) if float(penalty.weight) else None,
        "steps": trainer.state.global_step,
        "data": {
            "name": str(options.run.data),
            "sha256": rows_digest(ready.train.rows),
            "rows": len(ready.train.rows),
            "forms": ready.train.forms,
            "cut": ready.train.cut,
            "dropped": list(ready.train.dropped),
        },
        "options": {
            "run": vars(options.run),
            "training": options.training.to_dict(),
            "model": vars(options.model),
        },
        "penalty": penalty
        and {
            "kind": penalty.kind,
            "weight": float(penalty.weight),
            "temperature": penalty.temperature,
            "delta": penalty.delta,
        },
        "positions": trainer.attach_options.get("positions"),
        "anchors": anchors
        and {
            "rows": len(anchors),
            "per_step": anchors.per_step,
            "harmless_per_step": anchors.harmless_per_step,
            "penalty_weight": anchors.penalty_weight,
        },
        "safety_tokens": {"count": len(ready.tokens), "source": ready.tokens.source},
        "refusals": refusals,
        "notes": list(ready.notes),
        "evaluations": [entry for entry in trainer.state.log_history if "eval_loss" in entry],
        "log": log,
    }
    found: dict[str, Any] = finite(report)
    return found


def beginning(options: Any, ready: Any) -> dict[str, Any]:
    """Return what must be the same when a run is resumed.

    Args:
        options: the run's FinetuneOptions.
        ready: the run's Prepared.

    Returns:
        Options by name, and digests of rows and safety tokens, as JSON values.
    """
    training = options.training.to_dict()
    kept = {
        name: value
        for name, value in training.items()
        if name not in _FREE and not name.startswith(("logging_", "hub_", "push_to_hub"))
    }
    model = vars(options.model)
    found: dict[str, Any] = finite(
        {
            **kept,
            **model,
            "full": options.run.full,
            "early_stopping": options.run.early_stopping,
            "data": rows_digest(ready.train.rows),
            "eval_data": ready.evaluate and rows_digest(ready.evaluate.rows),
            "safety_tokens": ready.tokens.fingerprint,
            "processes": options.training.world_size,
        }
    )
    return found


def plan_of_run(options: Any, ready: Any) -> dict[str, Any]:
    """Return what a run would do, for a dry run.

    Args:
        options: the run's FinetuneOptions.
        ready: the run's Prepared.

    Returns:
        Counts, steps, the planner's memory of a step, and the first row.
    """
    training, rows = options.training, ready.train.rows
    lengths = [len(row["input_ids"]) for row in rows]
    batch = training.per_device_train_batch_size
    plan: dict[str, Any] = {
        "model": options.model.model_name_or_path,
        "rows": len(rows),
        "rows_for_evaluation": 0 if ready.evaluate is None else len(ready.evaluate.rows),
        "tokens": sum(lengths),
        "longest_row": max(lengths),
        "labels": sum(label != IGNORE_INDEX for row in rows for label in row["labels"][1:]),
        "rows_cut": ready.train.cut,
        "rows_without_a_label": len(ready.train.dropped),
        "steps": None,  # these two are filled in by `dry_run`, which has the trainer's batches
        "epochs": None,
        "rows_of_a_step": batch * training.gradient_accumulation_steps * training.world_size,
        "safety_tokens": len(ready.tokens),
        "held_on_rows": training.safety_positions,
        "memory_gib": _memory(options, ready, max(lengths)),
        "notes": list(ready.notes),
        "first_row": first_row(ready.tokenizer, rows[0]),
    }
    return plan


def long_context_notes(training: Any, model: Any) -> list[str]:
    """Say what --long-context has set, and what memory grows with the square of the length."""
    batch, times = training.per_device_train_batch_size, training.gradient_accumulation_steps
    # transformers 5.24 renamed this option
    checkpoints = getattr(training, "activation_checkpointing", training.gradient_checkpointing)
    config = model.config.get_text_config(decoder=True)
    attention = getattr(config, "_attn_implementation", None) or "eager"
    notes = [
        f"long context: gradient checkpointing {'on' if checkpoints else 'off'}, attention "
        f"{attention}, {batch} row(s) a forward, {times} forward(s) a step, rows of up to "
        f"{training.max_length or 'all'} tokens"
    ]
    window = getattr(config, "sliding_window", None)
    square = None
    if attention == "eager":
        square = "eager attention"
    elif attention == "sdpa" and window and (training.max_length or math.inf) > window:
        square = f"the mask of a sliding window of {window} tokens"
    elif attention == "sdpa" and (training.packing or batch > 1):
        square = "the mask of packed or padded rows"
    if square:
        notes.append(f"{square} takes memory that grows with the square of the rows' length")
    return notes


def steps_of(training: Any, batches: int) -> int:
    """Return the optimizer steps of a run.

    Args:
        training: TrainingArguments.
        batches: number of batches of one epoch, on this process.
    """
    if training.max_steps > 0:
        return int(training.max_steps)
    each = max(1, -(-batches // int(training.gradient_accumulation_steps)))
    return math.ceil(each * float(training.num_train_epochs))


def _memory(options: Any, ready: Any, longest: int) -> float | None:
    """Return the planner's peak memory of a step, GiB; None if it cannot plan this model."""
    training, wanted = options.training, options.model
    try:
        plan = plan_of(
            ready.model.config,
            PlanOptions(
                tokens=training.max_length if training.packing else longest,
                batch_size=training.per_device_train_batch_size,
                lora_rank=wanted.lora_r if wanted.use_peft else None,
                dtype=wanted.dtype,
                checkpointing=bool(training.gradient_checkpointing),
                attention=wanted.attn_implementation or "auto",
                accumulation=training.gradient_accumulation_steps,
                reference="none" if training.safety_positions == "none" else "live",
                ids=len(ready.tokens),
            ),
        )
    except ValueError:  # a model that cannot be built on fake tensors
        return None
    return round(plan.ways["ours"].peak / 2**30, 2)


def rows_digest(rows: Sequence[dict[str, list[int]]]) -> str:
    """Return the SHA-256 of the ids and labels of encoded rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row["input_ids"], row["labels"]]).encode())
    return digest.hexdigest()


def probe_refusals(model: Any, tokenizer: Any, count: int) -> dict[str, Any]:
    """Ask the model the package's probe prompts and count the refusals.

    Args:
        model: with its adapters, if it has any.
        tokenizer: with a chat template.
        count: probes of each kind, or all if there are fewer.

    Returns:
        For harmful and harmless: refusal, total, the Wilson interval, and a text of these.
    """
    found = {}
    for kind, name in _PROBES.items():
        prompts = [row.prompt for row in load_prompts(name)[:count]]
        counts = evaluate_refusals(
            lambda asked: answer_prompts(model, tokenizer, asked, max_new_tokens=_ANSWER_TOKENS),
            prompts,
        )
        low, high = counts.interval
        found[kind] = {
            "refusal": counts.refusal,
            "total": counts.total,
            "interval": [low, high],
            "text": f"{counts.refusal} ({100 * low:.0f} to {100 * high:.0f} %)",
        }
    return found


def model_card(report: dict[str, Any]) -> str:
    """Return the README of a run's folder."""
    refusals = report["refusals"]
    asked = next(iter(refusals.values()))["harmful"]["total"] if refusals else 0
    environment = Environment(autoescape=False, keep_trailing_newline=True)
    template = environment.from_string(_CARD)
    name, penalty = report["model"], report["penalty"]
    return template.render(
        report=report,
        held=held(report),
        holds=bool(penalty and penalty["weight"]),
        on_hub=bool(_HUB_ID.fullmatch(name)) and not Path(name).exists(),
        asked=asked,
        lora=report["adapter"],
        tokens=_ANSWER_TOKENS,
    )


def push(folder: Path, training: Any) -> None:
    """Upload a run's folder to the hub, without checkpoints.

    Args:
        folder: the folder of a finished run.
        training: TRL's config, with hub_model_id (the folder's name when None), hub_token and
            hub_private_repo.
    """
    api = HfApi(token=training.hub_token)
    name = training.hub_model_id or folder.name
    private = training.hub_private_repo
    repo = api.create_repo(name, private=private, exist_ok=True).repo_id
    api.upload_folder(repo_id=repo, folder_path=folder, ignore_patterns=["checkpoint-*"])


def held(report: dict[str, Any]) -> str:
    """Say in a few words which tokens the penalty held, where, and how strongly."""
    penalty, anchors = report["penalty"], report["anchors"]
    if penalty is None or not penalty["weight"]:
        return "nothing, it is plain fine-tuning"
    parts = []
    if report["positions"] != "none":
        parts.append(f"on the rows (positions {report['positions']!r})")
    if anchors:
        weight = anchors["penalty_weight"]
        parts.append(
            f"at {anchors['per_step']} harmful and {anchors['harmless_per_step']} harmless "
            f"prompts a step" + (f" with weight {weight:g}" if weight is not None else "")
        )
    return (
        f"{report['safety_tokens']['count']} safety tokens by {penalty['kind']} with weight "
        f"{penalty['weight']:g}, {' and '.join(parts)}"
    )


def first_row(tokenizer: Any, row: dict[str, list[int]]) -> str:
    """Return a row's text, safe to print, with >>> and <<< around the labelled parts."""
    text, inside = "", False
    run: list[int] = []
    for token, label in zip([*row["input_ids"], None], [*row["labels"], -100], strict=True):
        if (label != -100) != inside or token is None:
            said = printable(tokenizer.decode(run))
            text += f">>>{said}<<<" if inside else said
            run, inside = [], label != -100
        if token is not None:
            run.append(token)
    return text


def finite(value: Any) -> Any:
    """Convert a value to JSON types: None for numbers that are not finite, text for other types."""
    if isinstance(value, dict):
        return {str(key): finite(kept) for key, kept in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(kept) for kept in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _reference(attaching: dict[str, Any]) -> str:
    if "ref_model" in attaching:
        return "a frozen copy of the model before training"
    reference = attaching.get("reference")
    if reference == "start":
        return "the adapter as it was before training"
    return "read from a cache" if reference is not None else "the model without the adapter"
