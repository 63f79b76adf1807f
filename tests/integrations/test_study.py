"""The study: what its sentences credit, and the whole of it in a few steps."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_demo import builtin, run_with  # noqa: F401 - a fixture

from str_kernels.evals import load_prompts
from str_kernels.integrations import study
from str_kernels.integrations.chat_data import Example


def named(**refused: int) -> list[dict[str, Any]]:
    runs = []
    for name, count in refused.items():
        run = run_with(count)
        run["benign"]["outcomes"] = ["refusal"] * 3 + ["other"] * 97
        runs.append({"name": name.replace("_and_", " + ").replace("_", " "), **run})
    return runs


def test_each_sentence_is_about_its_pair() -> None:
    runs = named(plain=0, STR=2, refusal_rows=100, STR_and_anchors=60, random_and_anchors=40)
    found = study.compare("sums", runs)
    for said in (
        "STR and plain cannot be told apart (+2, exact McNemar p = 0.5)",
        "STR + anchors keeps 60 more than plain",
        "STR + anchors keeps 20 more than random + anchors",
        "STR + anchors keeps 40 fewer than refusal rows",
    ):
        assert said in found["summary"]
    assert found["pairs"]["STR + anchors against STR"]["harmful"]["only_first"] == 58
    assert found["pairs"]["STR + anchors against STR"]["benign"]["p_value"] == 1.0


def test_the_simple_baseline_has_as_many_harmful_prompts_as_the_anchors() -> None:
    rows = study._refusal_rows(load_prompts(study.ANCHORS), study.FULL)
    assert len(rows) == 40 * 2 and all(isinstance(row, Example) for row in rows)
    asked = {row.messages[0]["content"] for row in rows}
    harmful = {row.prompt for row in load_prompts(study.ANCHORS) if row.kind != "harmless"}
    assert asked <= harmful and len(asked) >= 64


def test_arms_differ_in_what_they_say() -> None:
    tokens, control = object(), object()
    held = {arm: study._held(arm, tokens, control, 0.1) for arm in study.ARMS}  # type: ignore[arg-type]
    assert held["plain"][1] == held["refusal rows"][1] == 0.0
    assert held["STR"] == held["STR + anchors"] == (tokens, 0.1)
    assert held["random + anchors"] == (control, 0.1)


@pytest.mark.slow  # a real model: half a minute
def test_quick_study(builtin: Any, tmp_path: Any, monkeypatch: Any) -> None:  # noqa: F811
    monkeypatch.setattr(study, "TASKS", {"sums that open with Sure!": "Sure! "})
    report = study.run_study(tmp_path, study.QUICK)
    (found,) = report["tasks"].values()
    runs = {run["name"]: run for run in found["runs"]}
    assert tuple(runs) == ("taught base", *study.ARMS)
    for arm in ("STR + anchors", "random + anchors"):
        first, last = (runs[arm]["log"][place] for place in (0, -1))
        assert first["safety/anchor_penalty"] == 0.0 and last["safety/anchor_penalty"] > 0.0
    assert "safety/anchor_penalty" not in runs["STR"]["log"][0]
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report))
    assert not (tmp_path / "stages").exists()
