"""`str-kernels finetune`: train with TRL's SFTTrainer and the safety loss, and write a folder."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor
from transformers import EarlyStoppingCallback, PrinterCallback, set_seed
from trl import get_peft_config, get_quantization_config
from typing_extensions import override

from ...files import write_json, write_text
from ...reference_cache import CachedReference
from ...tokens import SafetyTokens
from ..attach import tokens_of
from ..chat import EncodedRows, encode_rows, read_examples
from ..loading import adapter_folder, base_name, load_model, load_tokenizer, longest_row
from ..models import is_peft_model
from ..trainers.trl_sft import SafetySFTTrainer
from .curves import draw_curves
from .options import FinetuneOptions
from .report import (
    REPORT,
    beginning,
    describe,
    long_context_notes,
    model_card,
    plan_of_run,
    probe_refusals,
    push,
    steps_of,
)
from .run_folder import RunFolder
from .run_guard import NotFinite, RunGuard, Stopped

__all__ = ["FinetuneResult", "NotFinite", "Stopped", "dry_run", "finetune", "is_main", "prepare"]


@dataclass(frozen=True)
class FinetuneResult:
    """The folder and the report of a finished run."""

    folder: Path
    report: dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """What a run needs before its first step.

    Attributes:
        model: loaded; without adapters unless it was loaded from an adapter's folder.
        tokenizer: the model's.
        tokens: the safety tokens.
        train: rows to train on.
        evaluate: rows for evaluation, if any.
        notes: changes to rows or options that the user should know of, one line each.
    """

    model: Any
    tokenizer: Any
    tokens: SafetyTokens
    train: EncodedRows
    evaluate: EncodedRows | None
    notes: tuple[str, ...]


def prepare(
    options: FinetuneOptions,
    progress: Callable[[str], None] | None = None,
    before_model: Callable[[], None] | None = None,
) -> Prepared:
    """Read and encode the rows and load the model; nothing is written.

    Args:
        options: of the run.
        progress: called with a line of text before anything that takes seconds.
        before_model: called after the rows are encoded and before the model is loaded.

    Returns:
        What `finetune` trains with.

    Raises:
        ValueError: an option, the rows or the model is bad; the message says why.
    """
    run, training = options.run, options.training
    datasets.disable_progress_bars()  # the command shows its own
    say = progress or (lambda text: None)
    examples = read_examples(str(run.data), run.data_split)  # before anything slow
    held_out = []
    if run.eval_data:
        held_out = read_examples(run.eval_data, run.data_split, name="eval_data")
    if training.safety_cache is not None:
        _check_cache(training.safety_cache)
    if run.eval_fraction:
        count = max(1, round(run.eval_fraction * len(examples)))
        if count >= len(examples):
            raise ValueError(
                f"`eval_fraction` must leave rows to train on; got {run.eval_fraction} of "
                f"{len(examples)} rows"
            )
        chosen = set(random.Random(training.seed).sample(range(len(examples)), count))
        held_out = [one for place, one in enumerate(examples) if place in chosen]
        examples = [one for place, one in enumerate(examples) if place not in chosen]

    def encode(tokenizer: Any) -> tuple[EncodedRows, EncodedRows | None]:
        train = encode_rows(tokenizer, examples, training.max_length)
        return train, encode_rows(tokenizer, held_out, training.max_length) if held_out else None

    say(f"encode {len(examples)} rows")  # before the model, which may take minutes
    train, evaluate = encode(load_tokenizer(str(options.model.model_name_or_path)))
    if before_model is not None:
        before_model()
    model, tokenizer = _load(options, progress)
    notes = []
    longest = longest_row(model)
    if longest is not None and (training.max_length is None or training.max_length > longest):
        training.max_length = longest
        notes.append(f"rows are cut to the {longest} positions of the model")
        both = [*train.rows, *(evaluate.rows if evaluate else ())]
        if any(len(row["input_ids"]) > longest for row in both):
            train, evaluate = encode(tokenizer)
    if run.long_context:
        notes += long_context_notes(training, model)
    for rows in filter(None, (train, evaluate)):
        notes += rows.notes()
    return Prepared(
        model,
        tokenizer,
        tokens_of(training.settings, tokenizer),
        train,
        evaluate,
        tuple(dict.fromkeys(notes)),
    )


def finetune(
    options: FinetuneOptions,
    *,
    on_step: Callable[[int, int], None] | None = None,
    progress: Callable[[str], None] | None = None,
) -> FinetuneResult:
    """Fine-tune a model with the safety loss, and write everything into one folder.

    The folder holds the adapter or the model (safetensors), the tokenizer, safety_tokens.json,
    report.json, curves.png and a model card. During training it is named `OUTPUT.unfinished` and
    holds the checkpoints. It is renamed when it is complete, so OUTPUT is either whole or absent.

    Args:
        options: see `read_options`.
        on_step: called with the number of optimizer steps done and in total.
        progress: called with a line of text before anything that takes seconds.

    Returns:
        The folder and the report.

    Raises:
        ValueError: the input is bad; nothing has been written.
        NotFinite: a loss, a term or a gradient is not finite; the last checkpoint is intact.
        Stopped: a signal arrived; there is a checkpoint of the last step.
    """
    run = options.run
    folder = RunFolder(Path(run.output))
    main = is_main(options)
    if main:
        folder.check(overwrite=run.overwrite, resume=run.resume, inputs=_inputs(options))
    with folder.lock() if main else contextlib.nullcontext():
        return _run(options, folder, on_step, progress)


def _run(
    options: FinetuneOptions,
    folder: RunFolder,
    on_step: Callable[[int, int], None] | None,
    progress: Callable[[str], None] | None,
) -> FinetuneResult:
    run, training, main = options.run, options.training, is_main(options)
    unfinished = functools.partial(
        folder.check_unfinished, overwrite=run.overwrite, resume=run.resume
    )
    ready = prepare(options, progress, unfinished if main else None)
    began = beginning(options, ready)
    if run.resume:
        folder.check_same(began)
    checkpoint = folder.last_checkpoint() if run.resume else None
    refusals = {}
    if run.eval_refusals and main:
        refusals["before"] = probe_refusals(ready.model, ready.tokenizer, run.eval_refusals)
    training.output_dir = str(folder.path)
    # Trainer would push the unfinished folder; the finished one is pushed below
    pushes, training.push_to_hub = training.push_to_hub, False
    guard = RunGuard(_where(ready, packed=training.packing), None)
    trainer = _trainer(options, ready, guard)
    guard.scales_gradients = trainer.accelerator.scaler is not None
    total = steps_of(training, len(trainer.get_train_dataloader()))
    guard.on_step = None if on_step is None else lambda step: on_step(step, total)
    if main and not run.resume:
        folder.begin(began)
    try:
        with guard.signals():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except NotFinite as error:
        if not main:
            raise
        raise NotFinite(f"{error}. Its checkpoints are in {folder.set_aside()}") from error
    if guard.signal is not None and trainer.state.global_step < total:
        raise Stopped(guard.signal, trainer.state.global_step)
    model = trainer.accelerator.unwrap_model(trainer.model)
    report: dict[str, Any] = {}
    if main:
        if run.eval_refusals:
            refusals["after"] = probe_refusals(model, ready.tokenizer, run.eval_refusals)
        report = describe(options, ready, trainer, refusals)
        _write(folder.path, model, ready, report)
        folder.finish(overwrite=run.overwrite, keep_checkpoints=run.keep_checkpoints)
        if pushes:
            push(folder.output, training)
    trainer.accelerator.wait_for_everyone()
    return FinetuneResult(folder.output, report)


def is_main(options: FinetuneOptions) -> bool:
    """Tell whether this is the main process, which prints and writes."""
    return int(options.training.process_index) == 0


def dry_run(
    options: FinetuneOptions, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Return what `finetune` would do; nothing is trained or written.

    Args:
        options: see `read_options`.
        progress: called with a line of text before anything that takes seconds.

    Returns:
        Rows, tokens, labels, steps, memory, the first row with its labels marked, and notes.

    Raises:
        ValueError: as in `finetune`.
    """
    run = options.run
    RunFolder(Path(run.output)).check(
        overwrite=run.overwrite, resume=run.resume, inputs=_inputs(options)
    )
    ready = prepare(options, progress)
    plan = plan_of_run(options, ready)
    with tempfile.TemporaryDirectory() as folder:  # Trainer creates its output folder
        options.training.output_dir = folder
        trainer = _trainer(options, ready, RunGuard())
        batches = len(trainer.get_train_dataloader())
        plan["steps"] = steps_of(options.training, batches)
        each = options.training.gradient_accumulation_steps
        plan["epochs"] = round(plan["steps"] * each / batches, 1)
    return plan


class _RunTrainer(SafetySFTTrainer):
    """SafetySFTTrainer that passes the terms of each step to the guard."""

    def __init__(self, *args: Any, guard: RunGuard, **kwargs: Any) -> None:
        self.guard = guard
        super().__init__(*args, callbacks=[guard], **kwargs)

    @override
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training and self.safety is not None and self.safety.last is not None:
            terms = {"safety/ce": self.safety.last.ce, "safety/penalty": self.safety.last.penalty}
            if self.safety.last_anchors is not None:
                terms["safety/anchor_penalty"] = self.safety.last_anchors.penalty
            loss = found[0] if isinstance(found, tuple) else found
            self.guard.note({**terms, "loss": loss}, inputs["input_ids"])
        return found


def _load(options: FinetuneOptions, progress: Callable[[str], None] | None) -> tuple[Any, Any]:
    wanted = options.model
    more: dict[str, Any] = {}
    if wanted.attn_implementation is not None:
        more["attn_implementation"] = wanted.attn_implementation
    if wanted.model_revision != "main":
        more["revision"] = wanted.model_revision
    # the compute dtype of quantised layers; with "auto" TRL would look up torch.auto
    of_products = "bfloat16" if wanted.dtype == "auto" else wanted.dtype
    quantization = get_quantization_config(dataclasses.replace(wanted, dtype=of_products))
    if quantization is not None:
        more["quantization_config"] = quantization
    return load_model(wanted.model_name_or_path, dtype=wanted.dtype, progress=progress, **more)


def _trainer(options: FinetuneOptions, ready: Prepared, guard: RunGuard) -> _RunTrainer:
    run, training = options.run, options.training
    attaching: dict[str, Any] = {}
    peft = None
    if is_peft_model(ready.model):
        if run.full:
            raise ValueError("`full` must be off for an adapter's folder, which is gone on with")
        for name in sorted(options.chosen):
            if name.startswith("lora_") or name in ("use_dora", "use_rslora"):
                raise ValueError(
                    f"`{name}` must be left out for an adapter's folder: it has its own"
                )
        if training.safety_cache is not None:
            raise ValueError(
                "`safety_cache` must be None for an adapter's folder: the reference is the adapter "
                "at its start, and a cache is of a model without one"
            )
        attaching["reference"] = "start"
    elif options.model.use_peft:
        peft = get_peft_config(options.model)
    elif training.safety_cache is None:
        attaching["ref_model"] = copy.deepcopy(ready.model).requires_grad_(False).eval()
    set_seed(training.seed)
    try:
        trainer = _RunTrainer(
            model=ready.model,
            args=training,
            train_dataset=datasets.Dataset.from_list(ready.train.rows),
            eval_dataset=ready.evaluate and datasets.Dataset.from_list(ready.evaluate.rows),
            processing_class=ready.tokenizer,
            peft_config=peft,
            safety_tokens=ready.tokens,
            guard=guard,
            **attaching,
        )
    except (ImportError, RuntimeError, AssertionError, LookupError) as error:
        raise ValueError(f"the options must be ones that TRL takes; it says: {error}") from error
    trainer.remove_callback(PrinterCallback)  # prints every log entry; the command shows progress
    if run.early_stopping is not None:
        trainer.add_callback(EarlyStoppingCallback(run.early_stopping))
    return trainer


def _inputs(options: FinetuneOptions) -> list[Path]:
    """Return every file and folder that a run reads."""
    run, training = options.run, options.training
    named = [run.data, run.eval_data, options.model.model_name_or_path]
    named += [training.safety_anchors, training.safety_templates, training.safety_tokens]
    found = [Path(name) for name in (*named, training.safety_cache) if name]
    adapter = adapter_folder(str(options.model.model_name_or_path))
    if adapter is not None:
        found.append(Path(base_name(adapter)))
    return [path for path in found if path.exists()]


def _check_cache(folder: str) -> None:
    try:
        CachedReference(folder)
    except ValueError as error:
        raise ValueError(str(error).replace("`folder`", "`safety_cache`")) from error


def _where(ready: Prepared, packed: bool) -> Callable[[Tensor], str]:
    """Return a function that names the rows of the file that are in a batch."""

    def where(input_ids: Tensor) -> str:
        if packed:
            return "not known, packed"
        found = []
        for ids in input_ids.tolist():
            rows = zip(ready.train.rows, ready.train.where, strict=True)
            found += [
                place for row, place in rows if ids[: len(row["input_ids"])] == row["input_ids"]
            ][:1]
        return ", ".join(found) or "not known"

    return where


def _write(folder: Path, model: Any, ready: Prepared, report: dict[str, Any]) -> None:
    model.save_pretrained(folder)
    ready.tokenizer.save_pretrained(folder)
    ready.tokens.save(folder / "safety_tokens.json")
    log = [*report["log"], *report["evaluations"]]
    draw_curves(log, folder / "curves.png", model=report["model"])
    write_text(folder / "README.md", model_card(report))
    write_json(folder / REPORT, report)
