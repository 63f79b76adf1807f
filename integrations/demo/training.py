"""One LoRA fine-tuning with the safety loss, of any causal LM on any encoded rows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, TrainerCallback, TrainingArguments, set_seed

from ...op import SafetyPenalty
from ...reference_cache import CachedReference
from ...tokens import SafetyTokens
from ..anchors import AnchorPrompts
from ..models import Positions
from ..trainers import SafetyTrainer


@dataclass(frozen=True)
class TrainingOptions:
    """How long and how fast to train.

    Args:
        steps: optimizer steps.
        batch_size: rows per forward.
        accumulation: forwards per step.
        learning_rate: peak of the schedule, which falls linearly to 0.
        warmup: steps until the peak.
        lora_rank: r of the adapters, which are on all linear layers but the head.
        lora_alpha: scale of the adapters; None means 2 r.
        lora_dropout: probability.
        max_grad_norm: the norm to which gradients are clipped.
        seed: of the adapters, the order of rows and dropout.
        positions: where the penalty is taken, as in `attach`.
        ref_every: as in `attach`.
        ref_tokens: as in `attach`.
        backend: as in `attach`.
    """

    steps: int = 100
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 2e-4
    warmup: int = 0
    lora_rank: int = 8
    lora_alpha: int | None = None
    lora_dropout: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    positions: Positions = "none"
    ref_every: int = 1
    ref_tokens: int | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be >= 1; got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` must be > 0; got {self.learning_rate}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`lora_dropout` must be in [0, 1); got {self.lora_dropout}")


def train_lora(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, list[int]]],
    safety_tokens: SafetyTokens,
    penalty: SafetyPenalty,
    options: TrainingOptions,
    *,
    anchors: AnchorPrompts | None = None,
    reference: CachedReference | None = None,
    make_trainer: Callable[..., Any] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> tuple[Any, list[dict[str, float]]]:
    """Add LoRA adapters to `model` and train them; the reference is the model without them.

    Args:
        model: a causal LM, which PEFT freezes.
        tokenizer: pads the batches.
        rows: input_ids and labels of each row.
        safety_tokens: the tokens whose logits the penalty compares.
        penalty: kind and weight; weight 0 is plain cross-entropy with the drift still measured.
        options: length, rate, size and seed.
        anchors: the anchors of the penalty; None means the package's if the rows have no penalty.
        reference: the reference's logits from files, instead of the model without its adapters.
        make_trainer: makes another Trainer with its own loss, from the anchors and Trainer's usual
            arguments.
        on_step: called with the number of steps done.

    Returns:
        The PeftModel and the log: one dict per step with step, loss, safety/ce, safety/penalty,
        safety/max_drift, grad_norm and learning_rate; safety/anchor_penalty with anchors.
    """
    set_seed(options.seed)
    alpha = 2 * options.lora_rank if options.lora_alpha is None else options.lora_alpha
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=alpha,
        lora_dropout=options.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, config)
    with tempfile.TemporaryDirectory() as folder:  # Trainer needs one; nothing is saved there
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulation,
            learning_rate=options.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=options.warmup,
            max_grad_norm=options.max_grad_norm,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,
            seed=options.seed,
        )
        common = {
            "model": peft_model,
            "args": arguments,
            "train_dataset": list(rows),
            "processing_class": tokenizer,
            "data_collator": DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
            "callbacks": [_StepCallback(on_step)],
        }
        if make_trainer is not None:
            trainer = make_trainer(anchors=anchors, **common)
        else:
            trainer = SafetyTrainer(
                safety_tokens=safety_tokens,
                penalty=penalty,
                positions=options.positions,
                anchors=anchors,
                reference=reference,
                ref_every=options.ref_every,
                ref_tokens=options.ref_tokens,
                backend=options.backend,
                **common,
            )
        trainer.remove_callback(_printer())
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return peft_model, log


class _StepCallback(TrainerCallback):
    def __init__(self, on_step: Callable[[int], None] | None) -> None:
        self.on_step = on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.on_step is not None:
            self.on_step(state.global_step)


def _printer() -> Any:
    from transformers import PrinterCallback

    return PrinterCallback  # it prints every log entry; the command shows progress itself
