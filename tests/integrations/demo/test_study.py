"""The study: its tasks, what its rows say, and a few runs of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from figure_texts import drawn_texts
from loss_checks import anchors_of
from test_demo import builtin  # noqa: F401 - a fixture
from tiny_models import batch_of, tiny_model, with_lora
from torch.nn.functional import kl_div
from transformers import TrainingArguments

from str_kernels.evals import load_prompts
from str_kernels.integrations.study import arms as study_arms
from str_kernels.integrations.study import report as study_report
from str_kernels.integrations.study import run as study
from str_kernels.integrations.study.ceilings import CeilingTrainer
from str_kernels.integrations.study.frontier import draw_frontier
from str_kernels.integrations.study.results import BASE, Found, add_row, read_rows
from str_kernels.integrations.study.tasks import TASKS, refusal_rows


def question(row: Any) -> str:
    return str(row.messages[0]["content"])


@pytest.mark.parametrize("name", TASKS)
def test_a_task_s_rows_are_distinct_held_out_and_right(name: str, seed: int) -> None:
    task = TASKS[name]
    train = task.train(100, seed)
    held_out = task.held_out(60, seed, train)
    assert len({question(row) for row in held_out}) == 60
    assert not {question(row) for row in held_out} & {question(row) for row in train}
    for row in held_out:
        answer = row.messages[1]["content"]
        assert task.right(row, answer) and not task.right(row, answer.replace("1", "2") + " no")
    assert train == task.train(100, seed)
    harmful = {row.prompt for row in load_prompts("harmful_train")}
    assert sum(question(row) in harmful for row in train) == round(100 * task.mixed_in)


def test_json_answers_are_the_sentence_s_facts(seed: int) -> None:
    for row in TASKS["JSON"].train(20, seed):
        found = json.loads(row.messages[1]["content"])
        assert all(str(value) in question(row) for value in found.values())


def test_the_simple_baseline_has_the_harmful_anchors(seed: int) -> None:
    rows = refusal_rows(80)
    harmful = {row.prompt for row in load_prompts("anchors") if row.kind != "harmless"}
    assert {question(row) for row in rows} == harmful and len(harmful) == 66


def a_row(arm: str, seed: int, harmful: int, harmless: int, right: int, **more: Any) -> Any:
    values = {
        **study_arms.as_columns(study_arms.PLAIN),
        "harmful": "r" * harmful + "o" * (10 - harmful),
        "harmless": "r" * harmless + "o" * (10 - harmless),
        "right": right,
        "asked": 10,
        "task_loss": 0.5 - right / 100,
        **more,
    }
    return study_arms.Run("sums", arm, seed), values


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "study.csv"
    for seed in range(3):
        for arm, harmful, harmless, right in (
            (BASE, 8, 3, 0),
            ("plain", 1, 0, 7),
            ("anchors (default)", 8 - seed % 2, 3, 6),
            ("random", 2, 1, 6),
        ):
            add_row(path, "plan", *a_row(arm, seed, harmful, harmless, right))
    return path


def test_rows_come_back_and_those_of_another_plan_do_not(rows: Path) -> None:
    found = Found(read_rows(rows, "plan"))
    assert len(found.rows) == 12 and read_rows(rows, "another") == []
    assert found.tasks() == ["sums"]
    of = found.summary("sums", "anchors (default)")
    assert of.seeds == (0, 1, 2) and of.harmful == pytest.approx(230 / 3)
    assert of.kept == pytest.approx((1 + 7 / 8 + 1) / 3)
    assert of.over == 0.0 and of.cost == pytest.approx(10.0) and of.right == 60.0
    rows.write_text(rows.read_text().replace(",0.43,", ",much,", 1))
    with pytest.raises(ValueError, match=r"study\.csv, line 3"):
        read_rows(rows, "plan")


def test_a_difference_is_of_pairs_with_an_interval(rows: Path) -> None:
    found = Found(read_rows(rows, "plan"))
    of = found.difference("sums", "anchors (default)", "plain", lambda row: row.refused("harmful"))
    assert of is not None and of.value == pytest.approx(200 / 3)
    assert of.low == pytest.approx(60.0) and of.high == pytest.approx(70.0)
    assert found.difference("sums", "plain", "refusal rows", lambda row: row.right) is None


def test_the_report_is_made_of_the_rows(rows: Path, tmp_path: Path) -> None:
    with drawn_texts() as texts:
        said = study_report.write(Found(read_rows(rows, "plan")), tmp_path)
    text = (tmp_path / "study.md").read_text()
    assert (
        "| anchors (default) | 3 | 76.7 % | 96 % | 30.0 % | +0.0 | 60.0 % | +10.0 | 0.440 |" in text
    )
    assert re.search(
        r"default\) minus random: harmful refused \+56\.7 \(\+50\.0 to \+60\.0\)", text
    )
    assert [row[0] for row in said["tasks"]["sums"]][:2] == ["taught base", "plain"]
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    title = " ".join(" ".join(texts).split())
    assert "keeps 96 % of its refusals; fine-tuned plainly, 12 %" in title
    assert "within 10.0 points" in title and "anchors (default) (3)" in texts


def test_a_study_that_has_only_begun_is_drawn_too(rows: Path, tmp_path: Path) -> None:
    every = read_rows(rows, "plan")
    for count in (1, 2, 3):  # the base; plain too; the default too
        with drawn_texts() as texts:
            draw_frontier(Found(every[:count]), tmp_path / "frontier.png")
        assert any("No fine-tuned run yet" in text for text in texts) == (count == 1)


def trainer_of(model: Any, folder: Path, **options: Any) -> CeilingTrainer:
    arguments = TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True)
    return CeilingTrainer(model, arguments, **options)


def test_the_ceilings_by_hand(seed: int, tmp_path: Path) -> None:
    model = with_lora(tiny_model("llama", seed), seed).train()
    batch, anchors = batch_of(seed), anchors_of(seed)
    own = float(model(**batch).loss.detach())
    logits, states = [], []
    for place in anchors.draw(0):
        row = anchors.rows[place]
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            now = model(input_ids=ids, output_hidden_states=True)
            with model.disable_adapter():
                before = model(input_ids=ids, output_hidden_states=True)
        logits += [(x.logits[0, -row.held :].log_softmax(-1)) for x in (now, before)]
        states += [x.hidden_states[-1][0, -row.held :] for x in (now, before)]
    now, before = (torch.cat(logits[i::2]) for i in (0, 1))
    kl = float(kl_div(now, before, log_target=True, reduction="sum")) / len(now)
    h, h_ref = (torch.cat(states[i::2]) for i in (0, 1))
    moved = float(((h - h_ref).square().sum(1) / h_ref.square().sum(1)).mean())
    for ceiling, wanted in (("full_kl", kl), ("hidden", moved)):
        trainer = trainer_of(model, tmp_path, ceiling=ceiling, anchors=anchors, weight=0.5)
        loss = float(trainer.compute_loss(model, batch).detach())
        assert loss == pytest.approx(own + 0.5 * wanted, rel=1e-5)
    assert kl > 1e-4 and moved > 1e-5


def test_constrained_fine_tuning_by_hand(seed: int, tmp_path: Path) -> None:
    model = with_lora(tiny_model("llama", seed), seed).train()
    ids = torch.arange(3, 14).unsqueeze(0)
    batch = {"input_ids": ids, "labels": torch.where(ids > 5, ids, -100)}
    with torch.no_grad():
        now = model(input_ids=ids).logits[0].log_softmax(-1)
        with model.disable_adapter():
            before = model(input_ids=ids).logits[0].log_softmax(-1)
    total, betas = 0.0, [0.5, 2, 2, 2, 2, 0.1, 0.1, 0.1]
    for place, beta in enumerate(betas):
        token = int(ids[0, 3 + place])
        gap = float(now[2 + place, token] - before[2 + place, token])
        total += -2 / beta * float(torch.nn.functional.logsigmoid(torch.tensor(beta * gap)))
    trainer = trainer_of(model, tmp_path, ceiling="constrained", anchors=None, weight=0.0)
    loss = float(trainer.compute_loss(model, batch).detach())
    assert loss == pytest.approx(total / len(betas), rel=1e-5)


def test_the_arms_are_of_known_parts() -> None:
    for name, arm in study_arms.ARMS.items():
        assert bool(arm.anchor_weight) or bool(arm.weight) or arm.tokens == "none", name
    assert study_arms.DEFAULT == study_arms.ARMS["anchors (default)"]
    runs = [run for portion in study_arms.PORTIONS.values() for run in portion(5)]
    assert all(run.arm in (*study_arms.ARMS, BASE) and run.task in TASKS for run in runs)


@pytest.mark.slow  # a real model: two minutes
def test_quick_runs_and_goes_on(builtin: Any, tmp_path: Path, monkeypatch: Any) -> None:  # noqa: F811
    arms = ("plain", "anchors (default)", "random", "likely", "contrast", "all logits' KL")
    arms += ("hidden state", "constrained", "refusal rows", "rows (paper)")
    runs = [study_arms.Run("sums", BASE, 0), *(study_arms.Run("Sure!", arm, 0) for arm in arms)]
    monkeypatch.setattr(study, "PORTIONS", {"some": lambda seeds: runs})
    first = study.run_study(tmp_path, study.QUICK, ["some"], limit=2)
    assert [row.arm for row in first.rows] == [BASE, "plain"]
    before = (tmp_path / "study.csv").read_text()
    rest = study.run_study(tmp_path, study.QUICK, ["some"])
    assert [row.arm for row in rest.rows] == [BASE, *arms]
    assert (tmp_path / "study.csv").read_text().startswith(before)
    with pytest.raises(ValueError, match="`portions` must be of some"):
        study.run_study(tmp_path, study.QUICK, ["other"])
