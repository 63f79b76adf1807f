"""The figures that commands write: what their titles say, and that they can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from figure_texts import drawn_texts

from str_kernels.evals import wilson_interval
from str_kernels.integrations.demo import draw_comparison
from str_kernels.integrations.evaluation.figures import draw_drift, draw_refusals
from str_kernels.integrations.finetune.curves import draw_curves


def refused(count: int, total: int = 104, name: str = "refusal") -> dict[str, Any]:
    return {name: count, "total": total, "interval": wilson_interval(count, total)}


def joined(texts: list[str]) -> str:
    """Return all texts in one line: a title is broken where it has to be."""
    return " ".join(" ".join(texts).split())


def test_the_demo_s_title_has_its_counts(tmp_path: Path) -> None:
    names = ("taught base", "plain", "rows (paper)", "anchors (default)", "random tokens")
    runs = [
        {"name": name, "harmful": refused(harmful), "benign": refused(104)}
        | {"accuracy": refused(right, 100, "count")}
        for name, harmful, right in zip(
            names, (104, 7, 50, 99, 0), (0, 100, 20, 60, 60), strict=True
        )
    ]
    with drawn_texts() as texts:
        draw_comparison(runs, tmp_path / "demo.png")
    said = joined(texts)
    assert "refuses 104 of 104 harmful prompts; plain fine-tuning leaves 7, the default 99" in said
    assert "50/104" in texts and "100/100" in texts


@pytest.mark.parametrize("runs", [1, 2, 6])
@pytest.mark.parametrize("rules", [1, 3])
def test_refusals_of_many_runs_with_long_names_are_readable(
    tmp_path: Path, runs: int, rules: int
) -> None:
    names = [f"$_{number} is a run with a name that goes on" for number in range(runs)]
    counts = [{"harmful": refused(104 - run), "harmless": refused(0)} for run in range(runs)]
    counts[0] = {"harmful": refused(0, 0), "harmless": refused(0, 0)}  # none could be judged
    with drawn_texts() as texts:
        draw_refusals({f"rule {i}" * 9: counts for i in range(rules)}, names, tmp_path / "r.png")
    said = joined(texts)
    assert ("0 to 99 % in the 6 runs" in said) == (runs == 6)
    assert names[-1][:3].replace("$", r"\$") in said and "0/0" in texts


def test_drift_says_where_it_is_largest(tmp_path: Path) -> None:
    lines = {
        "harmful prompts": [
            {"position": 1, "prompts": 9, "rms": 2.0},
            {"position": 2, "prompts": 8, "rms": None},
        ],
        "harmless prompts": [
            {"position": 1, "prompts": 7, "rms": 0.5},
            {"position": 2, "prompts": 7, "rms": 3.125},
        ],
    }
    with drawn_texts() as texts:
        draw_drift(lines, tmp_path / "drift.png")
    assert "moved most at token 2: 3.12 logits rms, harmless prompts" in joined(texts)
    assert "harmful prompts (n = 9)" in texts
    nothing = {"harmful prompts": [{"position": 1, "prompts": 1, "rms": None}]}
    with drawn_texts() as texts:
        draw_drift(nothing, tmp_path / "drift.png")
    assert any("How far" in text for text in texts)


def test_curves_say_where_cross_entropy_went(tmp_path: Path) -> None:
    log: list[dict[str, Any]] = [
        {"step": step, "safety/ce": 2.0 - step / 10, "safety/penalty": 0.1 * step}
        | {"safety/anchor_penalty": 0.2, "safety/max_drift": 1.0 + step, "loss": 1.0}
        for step in range(1, 11)
    ]
    log += [{"step": 10, "eval_loss": 1.25}]
    with drawn_texts() as texts:
        draw_curves(log, tmp_path / "curves.png", model="someone/a-$model")
    said = joined(texts)
    assert "went from 1.9 to 1 nats per token" in said and r"a-\$model" in said
    with drawn_texts():
        draw_curves([], tmp_path / "curves.png")  # stopped before its first log
