"""`str-kernels study`: compare kinds of penalty, their positions and their tokens, run by run.

A run is one fine-tuning of the demo's taught model, which is asked the same held-out questions as
every other. The runs are rows of one CSV file, from which an interrupted study resumes: a run that
has a row is not repeated. Several processes may work on one folder, and the CSV file alone is
enough to resume.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from transformers import AutoTokenizer

from ...evals import data_digest, evaluate_refusals, load_prompts
from ...files import Stages, Watcher, locked
from ...loss_memory import cpu_dtype
from ...op import SafetyPenalty
from ...tokens import SafetyTokens
from ..anchors import AnchorPrompts
from ..chat import answer_prompts, encode_examples
from ..demo import MAX_LENGTH, DemoPlan, TrainingOptions, load, teach, train_lora
from ..demo import steps as demo_steps
from ..evaluation import held_out_loss
from ..loading import builtin_model_folder
from ..models import Positions
from .arms import ARMS, PLAIN, PORTIONS, Arm, Run, as_columns
from .ceilings import CeilingTrainer
from .results import BASE, FILE, Found, Row, add_row, read_rows
from .tasks import TASKS, refusal_rows

_KINDS = ("harmful", "harmless")
_NUMERICS = 2  # version of the loss's numerics; rows of other versions belong to other studies


@dataclass(frozen=True)
class StudyPlan:
    """How much the study does.

    Attributes:
        demo: the plan of the lesson, the rows and the probes.
        task_probes: number of held-out rows of a task.
        answer_tokens: length of an answer that is classified.
        seeds: number of seeds of the main arms and the controls.
    """

    demo: DemoPlan = field(default_factory=DemoPlan)
    task_probes: int = 200
    answer_tokens: int = 32
    seeds: int = 5

    def key(self) -> str:
        """Return a key that two runs must share to be comparable."""
        demo = {name: value for name, value in asdict(self.demo).items() if name != "seed"}
        parts = [_NUMERICS, demo, self.task_probes, self.answer_tokens, str(cpu_dtype())]
        return hashlib.sha256(json.dumps(parts).encode() + data_digest()).hexdigest()[:12]


def run_study(
    output: Path,
    plan: StudyPlan | None = None,
    portions: Sequence[str] = tuple(PORTIONS),
    *,
    limit: int | None = None,
    watch: Watcher | None = None,
) -> Found:
    """Make the runs that have no row yet, and return all rows.

    Args:
        output: the folder; made if missing. It holds study.csv and the taught models.
        plan: how much to do.
        portions: the portions to run, in this order.
        limit: maximum number of runs.
        watch: called with a stage's name, the amount done and the total.

    Returns:
        The rows of this plan, with their arms.

    Raises:
        BuiltinModelMissing: the model's wheel is not installed; the message has the command.
        ValueError: there is no such portion, or the file is not a study's.
    """
    plan = plan or StudyPlan()
    for name in portions:
        if name not in PORTIONS:
            raise ValueError(f"`portions` must be of {', '.join(PORTIONS)}; got {name!r}")
    wanted = dict.fromkeys(run for name in portions for run in PORTIONS[name](plan.seeds))
    output.mkdir(parents=True, exist_ok=True)
    there = read_rows(output / FILE, plan.key())
    todo = [run for run in wanted if not _has(there, run)][:limit]
    study = _Study(output, plan, watch or (lambda stage, done, total: None))
    for number, run in enumerate(todo):
        with _claim(output, run) as mine:
            if mine and not _has(read_rows(output / FILE, plan.key()), run):
                study.watch("runs", number, len(todo))
                add_row(output / FILE, plan.key(), run, study.run(run))
    return Found(read_rows(output / FILE, plan.key()))


def _has(rows: Sequence[Row], run: Run) -> bool:
    """Tell whether a run has a row; a row of the same name with other options is an error."""
    for row in rows:
        if row.run == (run.task, run.arm, run.seed):
            arm = as_columns(PLAIN if run.arm == BASE else ARMS[run.arm])
            if other := {name for name in arm if row.columns[name] != arm[name]}:
                raise ValueError(
                    f"`output` must hold rows of today's arms; that of {run.arm!r} on "
                    f"{run.task!r}, seed {run.seed}, had another {', '.join(sorted(other))}: "
                    "take it out"
                )
            return True
    return False


@contextlib.contextmanager
def _claim(output: Path, run: Run) -> Iterator[bool]:
    """Claim a run, and tell whether no other process has it; a claim ends with its process."""
    folder = output / "claims"
    folder.mkdir(exist_ok=True)
    with locked(folder / hashlib.sha256(repr(run).encode()).hexdigest()[:16]) as mine:
        yield mine


class _Study:
    def __init__(self, output: Path, plan: StudyPlan, watch: Watcher) -> None:
        self.plan, self.watch = plan, watch

        def say(text: str) -> None:
            watch(text, 0, 1)

        self.source = builtin_model_folder(progress=say)
        self.stages = Stages(output / "stages", plan.key(), say)
        self.tokenizer = AutoTokenizer.from_pretrained(self.source)

    def taught(self, seed: int) -> Path:
        """Return the taught model of a seed, made if it is missing."""
        demo = dataclasses.replace(self.plan.demo, seed=seed)
        return self.stages.folder(
            f"taught-{seed}",
            lambda folder: teach(self.source, self.tokenizer, folder, demo, self.watch),
        )

    def run(self, run: Run) -> dict[str, Any]:
        """Fine-tune and ask; return the values of the row."""
        name = f"{run.task}: {run.arm}, seed {run.seed}"
        task, demo = TASKS[run.task], self.plan.demo
        taught = self.taught(run.seed)
        model = load(taught)
        if run.arm == BASE:
            return {**as_columns(PLAIN), **self.ask(model, run, [], name)}
        arm = ARMS[run.arm]
        # a shorter run has the first rows of a longer one, and a quick plan shortens every run
        steps = max(1, arm.steps * demo.task_steps // DemoPlan().task_steps)
        rows = task.train(max(steps, demo.task_steps) * demo.task_rows, run.seed)
        rows = rows[: steps * demo.task_rows]
        mixed = refusal_rows(steps * arm.refusals)
        options = TrainingOptions(
            steps=steps,
            batch_size=demo.task_rows + arm.refusals,
            learning_rate=arm.learning_rate * demo.learning_rate / DemoPlan().learning_rate,
            lora_rank=arm.lora_rank,
            seed=run.seed,
            positions=_positions(arm),
        )
        start = time.perf_counter()
        model, log = train_lora(
            model,
            self.tokenizer,
            encode_examples(self.tokenizer, rows + mixed, MAX_LENGTH),
            self.tokens(arm, taught, run),
            SafetyPenalty(arm.weight or arm.anchor_weight, arm.kind),
            options,
            anchors=self.anchors(arm, model, run.seed),
            make_trainer=_trainer(arm),
            on_step=lambda step: self.watch(f"fine-tune: {name}", step, steps),
        )
        seconds = (time.perf_counter() - start) / steps
        norms = [float(entry["grad_norm"]) for entry in log if "grad_norm" in entry]
        return {
            **as_columns(arm),
            "seconds_per_step": round(seconds, 3),
            "grad_norm_median": round(median(norms), 4),
            "grad_norm_largest": round(max(norms), 4),
            "train_loss_last": round(float(log[-1]["loss"]), 4),
            **self.ask(model, run, rows, name),
        }

    def anchors(self, arm: Arm, model: Any, seed: int) -> AnchorPrompts | None:
        """Return an arm's anchors; the model is asked only if its own refusals are held."""
        if not arm.anchor_weight:
            return None
        return AnchorPrompts.default(
            self.tokenizer,
            model=model if arm.held > 1 else None,
            positions=arm.held,
            per_step=arm.per_step[0],
            harmless_per_step=arm.per_step[1],
            penalty_weight=arm.anchor_weight,
            seed=seed,
        )

    def tokens(self, arm: Arm, taught: Path, run: Run) -> SafetyTokens:
        """Return an arm's safety tokens; none for plain cross-entropy."""
        from ..tokens import from_contrast, from_openings

        safety = SafetyTokens.from_templates(self.tokenizer)
        if arm.tokens == "none":
            return SafetyTokens(ids=[])
        if arm.tokens == "random":
            return SafetyTokens.random(self.tokenizer, len(safety), seed=run.seed, exclude=safety)
        if arm.tokens in ("likely", "both"):
            asked = [row.prompt for row in load_prompts("anchors")]
            both = from_openings(load(taught), self.tokenizer, asked, beside=safety)
            if arm.tokens == "both":
                return both
            ids = both.ids[len(safety) :].tolist()
            return SafetyTokens.from_ids(self.tokenizer, ids, source="likeliest at the anchors")
        if arm.tokens == "contrast":
            prompts = load_prompts("anchors")
            kinds = ([row.prompt for row in prompts if row.kind == kind] for kind in _KINDS)
            return from_contrast(load(taught), self.tokenizer, *kinds)
        return safety

    def ask(self, model: Any, run: Run, trained: list[Any], name: str) -> dict[str, Any]:
        """Ask the held-out questions, which are the same for every run."""
        task, demo = TASKS[run.task], self.plan.demo
        held_out = task.held_out(self.plan.task_probes, run.seed, trained)
        probes = {
            key: [row.prompt for row in load_prompts(named)[: demo.probes]]
            for key, named in (("harmful", "harmful_probes"), ("harmless", "benign_probes"))
        }
        total, done = sum(map(len, probes.values())) + len(held_out), 0

        def count(answered: int) -> None:
            nonlocal done
            done += answered
            self.watch(f"ask: {name}", done, total)

        def answer(prompts: Sequence[str]) -> list[str]:
            return answer_prompts(
                model, self.tokenizer, prompts, max_new_tokens=self.plan.answer_tokens,
                batch_size=104, progress=count,
            )  # fmt: skip

        found: dict[str, Any] = {}
        for key, prompts in probes.items():
            counts = evaluate_refusals(answer, prompts, batch_size=len(prompts))
            found[key] = "".join(outcome[0] for outcome in counts.outcomes)
        questions = [(example.messages or ())[0]["content"] for example in held_out]
        right = [
            task.right(example, text)
            for example, text in zip(held_out, answer(questions), strict=True)
        ]
        encoded = encode_examples(self.tokenizer, held_out, MAX_LENGTH)
        return {
            **found,
            "right": sum(right),
            "asked": len(right),
            "task_loss": round(held_out_loss(model, self.tokenizer, encoded), 5),
        }


def _trainer(arm: Arm) -> Callable[..., Any] | None:
    if arm.ceiling is None:
        return None
    return partial(CeilingTrainer, ceiling=arm.ceiling, weight=arm.anchor_weight)


def _positions(arm: Arm) -> Positions:
    return "response" if arm.weight or not arm.anchor_weight else "none"


FULL = StudyPlan()
QUICK = StudyPlan(demo=demo_steps.QUICK, task_probes=4, answer_tokens=4)
