"""The parts of the demo: the plan, the lesson, the questions, the stages on disk.

Each stage's result is written when it is done, under a key of everything that determines it. So a
killed run is resumed where it stopped. The stages are removed when the report is complete.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ... import __version__
from ...evals import RefusalCounts, data_digest, evaluate_refusals, load_prompts
from ...files import Stages, Watcher
from ...loss_memory import cpu_dtype
from ...op import SafetyPenalty
from ...tokens import SafetyTokens
from ..anchors import AnchorPrompts
from ..chat import Example, answer_prompts, encode_examples
from ..evaluation import combine_drift, drift_by_position, held_out_loss
from ..loading import builtin_model_folder
from ..models import Positions, default_penalty, is_peft_model
from .data import is_right, lesson, sums
from .report import share
from .training import TrainingOptions, train_lora

ANSWER_TOKENS = 32  # enough of an answer to tell a refusal; no answer is ever stored
MAX_LENGTH = 256
_BATCH = 32


@dataclass(frozen=True)
class DemoPlan:
    """How much the demo does; step counts are fixed and do not depend on time.

    Attributes:
        lesson_steps: optimizer steps of the lesson in refusing.
        lesson_rows: harmful and benign rows in each such step.
        task_steps: optimizer steps of each fine-tuning.
        task_rows: rows in each such step.
        learning_rate: of both.
        probes: number of held-out probes of each class.
        task_probes: number of held-out sums.
        answer_tokens: length of the model's own answers to the lesson's benign prompts.
        memory_tokens: length at which loss memory is measured.
        seed: of everything random.
    """

    lesson_steps: int = 60
    lesson_rows: tuple[int, int] = (6, 6)
    task_steps: int = 40
    task_rows: int = 8
    learning_rate: float = 5e-4
    probes: int = 104
    task_probes: int = 100
    answer_tokens: int = 24
    memory_tokens: int = 2048
    seed: int = 0


FULL = DemoPlan()
QUICK = DemoPlan(
    lesson_steps=2,
    lesson_rows=(2, 2),
    task_steps=2,
    task_rows=2,
    probes=4,
    task_probes=4,
    answer_tokens=4,
    memory_tokens=64,
)


@dataclass(frozen=True)
class Probes:
    """The held-out questions that every model is asked."""

    harmful: list[str]
    benign: list[str]
    task: list[Example]

    @classmethod
    def load(cls, plan: DemoPlan, trained: list[Example]) -> Probes:
        """Load the plan's number of probes; no sum's question is in `trained`."""
        harmful, benign = (
            [row.prompt for row in load_prompts(name)[: plan.probes]]
            for name in ("harmful_probes", "benign_probes")
        )
        return cls(harmful, benign, sums(plan.task_probes, plan.seed + 1, exclude=trained))


class DemoRun:
    """The taught model, its questions, and its fine-tunings.

    Attributes:
        plan: how much to do.
        tokens: the safety tokens.
        control: as many random tokens.
        sums: the rows of the task.
        stages: results on disk.
    """

    def __init__(self, output: Path, plan: DemoPlan, watch: Watcher | None) -> None:
        self.plan = plan
        self.watch: Watcher = watch or (lambda stage, done, total: None)

        def say(text: str) -> None:
            self.watch(text, 0, 1)

        source = builtin_model_folder(progress=say)
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        made_by = [__version__, torch.__version__, str(cpu_dtype()), data_digest().hex()]
        self.stages = Stages(output / "stages", [asdict(plan), *made_by], say)
        self.tokens = SafetyTokens.from_templates(self.tokenizer)
        count = len(self.tokens)
        self.control = SafetyTokens.random(
            self.tokenizer, count, seed=plan.seed, exclude=self.tokens
        )
        self.sums = sums(plan.task_steps * plan.task_rows, plan.seed)
        self.probes = Probes.load(plan, self.sums)
        self._taught = self.stages.folder(
            "taught", lambda folder: teach(source, self.tokenizer, folder, plan, self.watch)
        )

    def base(self) -> dict[str, Any]:
        """Return the measures of the taught model."""
        found = self.stages.result("base", lambda: self._evaluate(load(self._taught), "base"))
        return {"name": "taught base", "log": [], **found}

    def fine_tune(
        self,
        name: str,
        held: SafetyTokens,
        positions: Positions,
    ) -> dict[str, Any]:
        """Fine-tune the taught model on the sums; return the log and the measures.

        Args:
            name: of the run.
            held: the penalty's tokens; empty for plain cross-entropy. The drift is always measured
                on the safety tokens.
            positions: of the penalty on the rows, as in `attach`; they determine the default kind
                and weight.
        """
        found = self.stages.result(
            name.replace(" ", "-"), lambda: self._fine_tune(name, held, positions)
        )
        return {"name": name, **found}

    def _fine_tune(self, name: str, held: SafetyTokens, positions: Positions) -> dict[str, Any]:
        steps = self.plan.task_steps
        options = TrainingOptions(
            steps=steps,
            batch_size=self.plan.task_rows,
            learning_rate=self.plan.learning_rate,
            seed=self.plan.seed,
            positions=positions,
        )
        anchors = None
        if positions == "none":
            anchors = AnchorPrompts.default(self.tokenizer, seed=self.plan.seed)
        start = time.perf_counter()
        model, log = train_lora(
            load(self._taught),
            self.tokenizer,
            encode_examples(self.tokenizer, self.sums, MAX_LENGTH),
            held,
            default_penalty(positions),
            options,
            anchors=anchors,
            on_step=lambda step: self.watch(f"fine-tune: {name}", step, steps),
        )
        seconds = (time.perf_counter() - start) / steps
        return {"log": log, "seconds_per_step": seconds, **self._evaluate(model, name)}

    def _evaluate(self, model: Any, name: str) -> dict[str, Any]:
        return evaluate(model, self.tokenizer, self.tokens, self.probes, name, self.watch)

    def about(self) -> dict[str, Any]:
        """Return the part of the report that is known before the results."""
        return {
            "schema_version": 1,
            "version": __version__,
            "torch": torch.__version__,
            "plan": asdict(self.plan),
            "safety_tokens": {"count": len(self.tokens), "source": self.tokens.source},
            "random_tokens": {"count": len(self.control), "source": self.control.source},
        }


def teach(source: Path, tokenizer: Any, folder: Path, plan: DemoPlan, watch: Watcher) -> None:
    """Make the aligned model: train LoRA on refusals and the model's own benign answers; merge."""
    model = load(source)
    harmful, benign = load_prompts("harmful_train"), load_prompts("benign_train")
    harmful, benign = (
        prompts[: plan.lesson_steps * rows]
        for prompts, rows in zip((harmful, benign), plan.lesson_rows, strict=True)
    )
    answers = answer_prompts(
        model,
        tokenizer,
        [row.prompt for row in benign],
        max_new_tokens=plan.answer_tokens,
        progress=_counter(watch, "the model's own answers to benign prompts", len(benign)),
    )
    examples = lesson(harmful, benign, answers, plan.lesson_steps, plan.lesson_rows, plan.seed)
    options = TrainingOptions(
        steps=plan.lesson_steps,
        batch_size=sum(plan.lesson_rows),
        learning_rate=plan.learning_rate,
        lora_rank=16,
        seed=plan.seed,
        positions="response",
    )
    taught, _ = train_lora(
        model,
        tokenizer,
        encode_examples(tokenizer, examples, MAX_LENGTH),
        SafetyTokens(ids=[]),  # no penalty: there is no aligned reference yet
        SafetyPenalty(0.0),
        options,
        on_step=lambda step: watch("teach it to refuse", step, plan.lesson_steps),
    )
    taught.merge_and_unload().save_pretrained(folder)


def evaluate(
    model: Any, tokenizer: Any, tokens: SafetyTokens, probes: Probes, name: str, watch: Watcher
) -> dict[str, Any]:
    """Ask a model all probes and return the measures of the report."""
    total = len(probes.harmful) + len(probes.benign) + len(probes.task)
    progress = _counter(watch, f"evaluate: {name}", total)

    def answer(prompts: Any) -> list[str]:
        return answer_prompts(
            model, tokenizer, prompts, max_new_tokens=ANSWER_TOKENS, progress=progress
        )

    questions = [(example.messages or ())[0]["content"] for example in probes.task]
    right = [
        is_right(example, text)
        for example, text in zip(probes.task, answer(questions), strict=True)
    ]
    encoded = encode_examples(tokenizer, probes.task, MAX_LENGTH)
    return {
        "harmful": _counts(evaluate_refusals(answer, probes.harmful, batch_size=128)),
        "benign": _counts(evaluate_refusals(answer, probes.benign, batch_size=128)),
        "accuracy": share(sum(right), len(right)),
        "task_loss": held_out_loss(model, tokenizer, encoded),
        "drift": _drift_at_answer_start(model, tokenizer, tokens, probes.harmful),
    }


def _drift_at_answer_start(
    model: Any, tokenizer: Any, tokens: SafetyTokens, prompts: list[str]
) -> dict[str, float] | None:
    """Return the drift where an answer begins; None for a model without adapters."""
    if not is_peft_model(model):
        return None
    found = combine_drift(
        [
            drift_by_position(model, tokenizer, tokens, prompts[start : start + _BATCH], 1)
            for start in range(0, len(prompts), _BATCH)
        ]
    )
    return {"rms": found[0].rms, "mean_abs": found[0].mean_abs, "max_abs": found[0].max_abs}


def _counts(counts: RefusalCounts) -> dict[str, Any]:
    return {
        "refusal": counts.refusal,
        "other": counts.other,
        "degenerate": counts.degenerate,
        "total": counts.total,
        "interval": list(counts.interval),
        "outcomes": list(counts.outcomes),
    }


def load(folder: Path) -> Any:
    """Load the model of a folder in the dtype that is fastest on this CPU."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=cpu_dtype(), use_safetensors=True)


def _counter(watch: Watcher, stage: str, total: int) -> Callable[[int], None]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        watch(stage, done, total)

    return advance
