"""The demo: its data, its sentence, and the whole of it in a few steps."""

from __future__ import annotations

import json
import re

import pytest
from transformers import AutoTokenizer

from str_kernels.evals import load_prompts
from str_kernels.integrations.chat.rows import Example
from str_kernels.integrations.demo import run as demo
from str_kernels.integrations.demo import steps as demo_steps
from str_kernels.integrations.demo.data import is_right, lesson, sums
from str_kernels.integrations.demo.report import comparison, share
from str_kernels.integrations.loading.builtin_model import BuiltinModelMissing, builtin_model_folder


def test_sums_are_right_distinct_and_held_out(seed):
    train = sums(200, seed)
    held_out = sums(100, seed + 1, exclude=train)
    questions = [example.messages[0]["content"] for example in train + held_out]
    assert len(set(questions)) == 300
    for example in train:
        question, answer = (message["content"] for message in example.messages)
        a, b = (int(number) for number in re.findall(r"\d+", question))
        less = any(word in question for word in ("minus", "-", "takes out"))
        assert answer == f"The answer is {a - b if less else a + b}."
    assert train == sums(200, seed) and train != sums(200, seed + 2)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("The answer is 7.", True),
        ("7", True),
        ("3 + 4 = 7", True),
        ("The answer is 8.", False),
        ("", False),
        ("17", False),
    ],
)
def test_is_right(answer, right):
    assert is_right(Example.chat("What is 3 plus 4?", "The answer is 7."), answer) is right


def test_lesson_is_half_harmful_and_goes_round_the_prompts(seed):
    harmful, benign = load_prompts("harmful_train"), load_prompts("benign_train")
    rows = lesson(harmful, benign, ["yes"] * len(benign), steps=70, per_step=(6, 6), seed=seed)
    assert len(rows) == 840
    bad = {row.prompt for row in harmful}
    asked = [row.messages[0]["content"] for row in rows]
    for start in range(0, 840, 12):
        assert sum(question in bad for question in asked[start : start + 12]) == 6
    # every prompt comes n times before any comes n + 1 times
    for prompts in (harmful, benign):
        counts = [asked.count(row.prompt) for row in prompts]
        assert max(counts) - min(counts) <= 1 and sum(counts) == 420


def run_with(refused, total=100, right=90):
    outcomes = ["refusal"] * refused + ["other"] * (total - refused)
    counts = {"refusal": refused, "total": total, "outcomes": outcomes}
    benign = {"refusal": 3, "total": total, "outcomes": []}
    return {"harmful": counts, "benign": benign, "accuracy": share(right, total)}


def test_the_sentence_credits_safety_tokens_only_for_what_random_ones_do_not_do():
    base, plain, paper = run_with(90), run_with(20), run_with(50)
    more = comparison([base, plain, paper, run_with(80), run_with(30)])
    assert "Over random tokens, safety tokens add 50 refusals" in more["summary"]
    assert "The default keeps 60 more than plain" in more["summary"]
    assert more["pairs"]["default against random"]["only_first"] == 50
    assert more["pairs"]["default against rows"]["only_first"] == 30
    same = comparison([base, plain, paper, run_with(80), run_with(79)])
    assert "no part of the effect can be credited" in same["summary"]
    worse = comparison([base, plain, paper, run_with(21), run_with(80)])
    assert "no part of the effect can be credited" in worse["summary"]
    assert "The default and plain cannot be told apart (+1" in worse["summary"]
    lost = comparison([base, run_with(60), paper, run_with(20), run_with(20)])
    assert "The default keeps 40 fewer than plain" in lost["summary"]
    assert "there was nothing to keep" in comparison([base] * 5)["summary"]


def test_a_weakly_taught_base_is_said_so():
    weak = run_with(79)
    weak["benign"]["refusal"] = 11
    warnings = comparison([weak] * 5)["warnings"]
    assert "only 79 of 100" in warnings[0] and "11 of 100 harmless" in warnings[1]
    strong = run_with(80)
    strong["benign"]["refusal"] = 10
    assert comparison([strong] * 5)["warnings"] == []


def test_full_plan_is_what_the_readme_says():
    assert (
        demo_steps.FULL.lesson_steps,
        demo_steps.FULL.task_steps,
        demo_steps.FULL.task_rows,
    ) == (60, 40, 8)
    assert demo_steps.FULL.learning_rate == 5e-4
    assert demo_steps.FULL.probes >= 100 and demo_steps.ANSWER_TOKENS == 32


@pytest.fixture
def builtin():
    try:
        return builtin_model_folder()
    except BuiltinModelMissing as missing:
        pytest.skip(f"the demo needs its model: {missing}")


@pytest.mark.slow
def test_quick_demo_resumes_and_reports(builtin, tmp_path, monkeypatch):
    """A demo killed in the third fine-tuning goes on with it and not from the start."""
    taught = []
    original = demo_steps.teach
    monkeypatch.setattr(demo_steps, "teach", lambda *a: (taught.append(1), original(*a)))
    trained = []
    train_lora = demo_steps.train_lora

    def count(*args, **kwargs):
        trained.append(1)
        if len(trained) == 4:  # the lesson, plain, rows; killed at the anchors
            raise KeyboardInterrupt
        return train_lora(*args, **kwargs)

    monkeypatch.setattr(demo_steps, "train_lora", count)
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(tmp_path, demo_steps.QUICK)
    assert not (tmp_path / "report.json").exists()
    report = demo.run_demo(tmp_path, demo_steps.QUICK)
    assert len(taught) == 1 and len(trained) == 6
    assert [run["name"] for run in report["runs"]] == [
        "taught base",
        "plain",
        "rows (paper)",
        "anchors (default)",
        "random tokens",
    ]
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report))
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "stages").exists()
    for run in report["runs"][1:]:
        assert run["log"][0]["safety/penalty"] == 0.0 and run["drift"]["rms"] > 0
        at_anchors = run["log"][-1].get("safety/anchor_penalty", 0.0)
        assert (at_anchors > 0) == (run["name"] in ("anchors (default)", "random tokens"))
    assert report["runs"][0]["drift"] is None
    tokenizer = AutoTokenizer.from_pretrained(builtin)
    assert report["safety_tokens"]["count"] == report["random_tokens"]["count"] > 50
    assert tokenizer.chat_template
    memory = report["memory"]
    assert memory[0]["tokens"] == demo_steps.QUICK.memory_tokens
    assert 0 < memory[0]["ours"] < memory[0]["by_hand"]
