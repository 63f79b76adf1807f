"""One LoRA run in every trainer, whose losses must be the same in each step.

A plain loop, Accelerate, SafetyTrainer and SafetySFTTrainer get the same rows in the same order,
the same initial adapters and the same schedule. They differ in how they count labels over
accumulated micro-batches, average, log, and call the attached model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from str_kernels import AnchorPrompts, SafetyPenalty, SafetyTokens, attach
from str_kernels.integrations.figures import (
    BLACK,
    ORANGE,
    PALE,
    SKY,
    legend,
    new_figure,
    save,
    style,
)

from ..results import Row, origin

PLAIN, ACCELERATE, TRAINER, TRL = "plain loop", "Accelerate", "SafetyTrainer", "SafetySFTTrainer"
PROTOCOL = (
    "The built-in model (SmolLM2-135M, float32) with LoRA r = 8 on q_proj and v_proj on templated "
    "sums; AdamW, linear decay, gradients clipped at 1; {accumulation} micro-steps of {batch_size} "
    "rows each. Of each step the loss that the trainer logs; off: its largest distance to the "
    "plain loop's, of that."
)
Log = list[dict[str, float]]


@dataclass(frozen=True)
class Setup:
    """The inputs of all trainers.

    Attributes:
        make_model: makes a new PeftModel, always the same.
        tokenizer: of the model.
        examples: question and answer of each row, in order; they are used once.
        tokens: the safety tokens.
        penalty: kind and weight.
        batch_size: rows of a micro-batch.
        accumulation: micro-batches of a step.
        learning_rate: of the first step.
        anchors: prompts at which the penalty is taken in each step too.
    """

    make_model: Callable[[], Any]
    tokenizer: Any
    examples: Sequence[tuple[str, str]]
    tokens: SafetyTokens
    penalty: SafetyPenalty
    batch_size: int = 2
    accumulation: int = 2
    learning_rate: float = 1e-3
    anchors: AnchorPrompts | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of `attach`; a penalty on the rows, so that its shares are compared too."""
        return {"penalty": self.penalty, "anchors": self.anchors, "positions": "response"}

    @property
    def steps(self) -> int:
        """The number of optimizer steps."""
        return len(self.examples) // (self.batch_size * self.accumulation)

    def micro_batches(self) -> list[dict[str, Tensor]]:
        """Return the collated rows, without Trainer."""
        from transformers import DataCollatorForSeq2Seq

        collate = DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=-100)
        rows = self.rows()
        return [
            dict(collate(rows[start : start + self.batch_size]))
            for start in range(0, len(rows), self.batch_size)
        ]

    def rows(self) -> list[dict[str, list[int]]]:
        """Return the rows as input_ids and labels."""
        from str_kernels.integrations.chat.rows import Example, encode_examples

        examples = [Example.chat(question, answer) for question, answer in self.examples]
        return encode_examples(self.tokenizer, examples, 256)


def plain_loop(setup: Setup) -> Log:
    """Train with torch alone; num_items_in_batch makes accumulation exact."""
    model = setup.make_model().train()
    optimizer, schedule = _optimizer(model, setup)
    log: Log = []
    batches = setup.micro_batches()
    with attach(model, setup.tokens, **setup.options) as handle:
        for start in range(0, len(batches), setup.accumulation):
            window = batches[start : start + setup.accumulation]
            count = sum((batch["labels"][:, 1:] != -100).sum() for batch in window)
            entry = dict.fromkeys(("loss", "safety/ce", "safety/penalty"), 0.0)
            for batch in window:
                loss = model(**batch, num_items_in_batch=count).loss
                loss.backward()
                entry = _added(entry, loss, handle.last)
            _step(model, optimizer, schedule)
            log.append(entry)
    return log


def accelerate_loop(setup: Setup) -> Log:
    """Train with Accelerate's accumulation, which divides the loss, so it is multiplied here."""
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=setup.accumulation, cpu=True)
    model = setup.make_model().train()
    handle = attach(model, setup.tokens, **setup.options)  # before prepare() wraps it
    optimizer, schedule = _optimizer(model, setup)
    batches = setup.micro_batches()
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    log: Log = []
    for start in range(0, len(batches), setup.accumulation):
        window = batches[start : start + setup.accumulation]
        count = sum((batch["labels"][:, 1:] != -100).sum() for batch in window)
        entry = dict.fromkeys(("loss", "safety/ce", "safety/penalty"), 0.0)
        for batch in window:
            with accelerator.accumulate(wrapped):
                loss = wrapped(**batch, num_items_in_batch=count).loss
                accelerator.backward(loss * setup.accumulation)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            entry = _added(entry, loss, handle.last)
        schedule.step()
        log.append(entry)
    handle.remove()
    return log


def safety_trainer(setup: Setup) -> Log:
    """Train with transformers' Trainer."""
    from transformers import DataCollatorForSeq2Seq, TrainingArguments

    from str_kernels.integrations.trainers.hf_trainer import SafetyTrainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = SafetyTrainer(
            setup.make_model(),
            TrainingArguments(**_arguments(setup, folder), remove_unused_columns=False),
            train_dataset=setup.rows(),
            data_collator=DataCollatorForSeq2Seq(setup.tokenizer, label_pad_token_id=-100),
            safety_tokens=setup.tokens,
            **setup.options,
        )
        return _trained(trainer)


def safety_sft_trainer(setup: Setup) -> Log:
    """Train with TRL's SFTTrainer, which encodes the conversations itself."""
    from datasets import Dataset
    from trl import SFTConfig

    from str_kernels.integrations.trainers.trl_sft import SafetySFTTrainer

    rows = [
        {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for question, answer in setup.examples
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = SafetySFTTrainer(
            setup.make_model(),
            SFTConfig(**_arguments(setup, folder), max_length=256, bf16=False),
            train_dataset=Dataset.from_list(rows),
            processing_class=setup.tokenizer,
            safety_tokens=setup.tokens,
            **setup.options,
        )
        return _trained(trainer)


TRAINERS: dict[str, Callable[[Setup], Log]] = {
    PLAIN: plain_loop,
    ACCELERATE: accelerate_loop,
    TRAINER: safety_trainer,
    TRL: safety_sft_trainer,
}


def measure(steps: int = 10, weight: float = 0.3) -> list[Row]:
    """Train the built-in model in every trainer; return a row for each step of each."""
    from transformers import AutoTokenizer

    from str_kernels.integrations.demo.data import sums
    from str_kernels.integrations.loading.builtin_model import builtin_model_folder

    tokenizer = AutoTokenizer.from_pretrained(builtin_model_folder())
    batch_size = accumulation = 2
    examples = [
        tuple(turn["content"] for turn in example.messages or ())
        for example in sums(steps * batch_size * accumulation, seed=0)
    ]
    setup = Setup(
        _builtin, tokenizer, examples, SafetyTokens.from_templates(tokenizer), SafetyPenalty(weight)
    )  # type: ignore[arg-type]
    base = origin("cpu", PROTOCOL.format(accumulation=accumulation, batch_size=batch_size))
    logs = {name: run(setup) for name, run in TRAINERS.items()}
    return [
        base | {"trainer": name, "step": step + 1, **entry, "off": off(entry, logs[PLAIN][step])}
        for name, log in logs.items()
        for step, entry in enumerate(log)
    ]


def off(entry: dict[str, float], expected: dict[str, float]) -> float:
    """Return the difference of two losses, relative to the second."""
    return abs(entry["loss"] - expected["loss"]) / abs(expected["loss"])


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw loss and penalty over the steps, with the lines of all trainers overlaid, as a PNG."""
    farthest = max(float(row["off"]) for row in rows)
    figure = new_figure(
        3.5,
        f"{len(TRAINERS)} trainers log the same loss, to within {farthest:.1e} of it",
        f"{rows[0]['device']}, torch {rows[0]['torch']}. One run of each. {rows[0]['protocol']}",
    )
    for axes, name, label in zip(
        figure.subplots(1, 2), ("loss", "safety/penalty"),
        ("loss (nats per token)", "penalty (squared logits)"), strict=True,
    ):  # fmt: skip
        # from thick to thin, so that a line is visible around the one drawn over it
        for place, trainer in enumerate(TRAINERS):
            mine = [row for row in rows if row["trainer"] == trainer]
            axes.plot(
                [int(row["step"]) for row in mine],
                [float(row[name]) for row in mine],
                linewidth=9 - 2.4 * place,
                color=(PALE, SKY, ORANGE, BLACK)[place],
                label=trainer,
            )
        style(axes, title=label, x="optimizer step")
    legend(figure.axes[1])
    save(figure, path)


def _builtin() -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from str_kernels.integrations.loading.builtin_model import builtin_model_folder

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(builtin_model_folder(), dtype=torch.float32)
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def _optimizer(model: Any, setup: Setup) -> tuple[Any, Any]:
    from transformers import get_linear_schedule_with_warmup

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=setup.learning_rate, weight_decay=0.0)
    return optimizer, get_linear_schedule_with_warmup(optimizer, 0, setup.steps)


def _step(model: Any, optimizer: Any, schedule: Any) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def _added(entry: dict[str, float], loss: Tensor, terms: Any) -> dict[str, float]:
    return {
        "loss": entry["loss"] + float(loss.detach()),
        "safety/ce": entry["safety/ce"] + float(terms.ce),
        "safety/penalty": entry["safety/penalty"] + float(terms.penalty),
    }


def _arguments(setup: Setup, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": setup.steps,
        "per_device_train_batch_size": setup.batch_size,
        "gradient_accumulation_steps": setup.accumulation,
        "learning_rate": setup.learning_rate,
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def _trained(trainer: Any) -> Log:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()
    names = ("loss", "safety/ce", "safety/penalty")
    return [
        {name: entry[name] for name in names}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
