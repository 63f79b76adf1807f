"""`str-kernels demo`: teach a small model to refuse, fine-tune it four ways, count refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...files import Watcher, write_json
from ...loss_memory import measure_loss_memory
from ...tokens import SafetyTokens
from .figure import draw_comparison
from .report import comparison
from .steps import FULL, QUICK, DemoPlan, DemoRun

__all__ = ["FULL", "QUICK", "run_demo"]


def run_demo(
    output: Path, plan: DemoPlan = FULL, *, watch: Watcher | None = None
) -> dict[str, Any]:
    """Run the demo and write report.json and demo.png into `output`.

    Args:
        output: the folder; made if missing. An interrupted run in it, with the same plan and
            version, is resumed.
        plan: how much to do.
        watch: called with a stage's name, the amount done and the total.

    Returns:
        The report: plan, one entry per model, the comparisons and their summary.

    Raises:
        BuiltinModelMissing: the model's wheel is not installed; the message has the command.
    """
    demo = DemoRun(output, plan, watch)
    runs = [
        demo.base(),
        demo.fine_tune("plain", SafetyTokens(ids=[]), "response"),
        demo.fine_tune("rows (paper)", demo.tokens, "response"),
        demo.fine_tune("anchors (default)", demo.tokens, "none"),
        demo.fine_tune("random tokens", demo.control, "none"),
    ]
    demo.watch("loss memory", 0, 1)
    memory = demo.stages.result(
        "memory", lambda: [entry._asdict() for entry in measure_loss_memory(plan.memory_tokens)]
    )
    demo.watch("loss memory", 1, 1)
    report = {**demo.about(), "runs": runs, "memory": memory, **comparison(runs)}
    draw_comparison(runs, output / "demo.png")
    write_json(output / "report.json", report)
    demo.stages.remove()
    return report
