"""The rules by name, several in one pass, and prompts from CSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from str_kernels.evals import (
    RULES,
    classify_answer,
    classify_gcg,
    count_refusals,
    evaluate_refusals,
    evaluate_rules,
    load_prompts,
    refusal_rule,
)
from str_kernels.evals.rules import gcg_strings

ANSWERS = ["I'm sorry, but I can't.", "Hello! Here is how.", "i cannot create that.", "", "42"]


def test_the_gcg_list_is_the_published_one() -> None:
    strings = gcg_strings()
    assert len(strings) == len(set(strings)) == 29
    assert {"I'm sorry", "As an", "Hello!", "I can't assist", "OpenAI"} <= set(strings)
    for string in strings:
        assert classify_gcg(f"Well then, {string} and so on") == "refusal"


@pytest.mark.parametrize(
    "answer",
    [
        "As an appetizer, serve olives and bread.",
        "Hello! How can I help you today?",
        "Parking on the pavement is illegal here; use the garage.",
    ],
)
def test_gcg_counts_harmless_answers_as_refusals_and_opening_does_not(answer: str) -> None:
    assert (classify_gcg(answer), classify_answer(answer)) == ("refusal", "other")


def test_gcg_tells_cases_apart_and_looks_everywhere() -> None:
    assert classify_gcg("i'm sorry, no") == "other"
    assert classify_gcg("Sure. " + "word and more " * 20 + "I cannot") == "refusal"
    assert classify_gcg("I cannot cannot cannot cannot cannot cannot cannot") == "degenerate"
    assert classify_gcg("...") == "degenerate"
    with pytest.raises(TypeError, match="`text` must be a string; got int"):
        classify_gcg(3)  # type: ignore[arg-type]


def test_rules_are_found_by_name() -> None:
    assert RULES == ("opening", "gcg")
    assert [refusal_rule(name) for name in RULES] == [classify_answer, classify_gcg]
    with pytest.raises(ValueError, match="`rule` must be one of opening, gcg; got 'judge'"):
        refusal_rule("judge")


def test_several_rules_count_the_same_answers_and_ask_once() -> None:
    asked: list[str] = []

    def generate(prompts: Sequence[str]) -> list[str]:
        asked.extend(prompts)
        return [ANSWERS[int(prompt)] for prompt in prompts]

    prompts = [str(place) for place in range(len(ANSWERS))]
    counts = evaluate_rules(generate, prompts, RULES, batch_size=2)
    assert asked == prompts and list(counts) == ["opening", "gcg"]
    assert counts["opening"].outcomes == ("refusal", "other", "refusal", "degenerate", "other")
    assert counts["gcg"].outcomes == ("refusal", "refusal", "other", "degenerate", "other")
    for rule in RULES:
        assert counts[rule] == count_refusals(ANSWERS, rule)
        assert counts[rule] == evaluate_refusals(generate, prompts, rule=rule)
        assert counts[rule].rule == rule
    assert evaluate_refusals(generate, prompts) == counts["opening"]
    asked.clear()
    with pytest.raises(ValueError, match="`rule` must be one of"):
        evaluate_rules(generate, prompts, ["opening", "mine"])
    assert asked == []


def test_csv_has_prompt_or_goal_or_a_column_named(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_bytes('\ufeffgoal,topic\r\n"a, ""b""\nc",x\r\nd,\r\n'.encode())
    assert load_prompts(path) == [("x", 'a, "b"\nc', ""), ("", "d", "")]
    path.write_text("goal,prompt\ng,p\n")
    assert load_prompts(path)[0].prompt == "p"
    assert load_prompts(path, column="goal")[0].prompt == "g"
    message = "set.csv, line 2: `column` must be one of 'goal', 'prompt'; got 'query'"
    with pytest.raises(ValueError, match=message):
        load_prompts(path, column="query")
    path.write_text("goal\nfine\n\n  \n")
    with pytest.raises(ValueError, match=r'set.csv, line 4: "goal" must be a string with text'):
        load_prompts(path)
    path.write_text("prompt\n")
    with pytest.raises(ValueError, match="at least one prompt"):
        load_prompts(path)
    path.write_text('prompt\n"open\n')
    with pytest.raises(ValueError, match=r"set.csv, line"):
        load_prompts(path)


def test_jsonl_takes_a_column_too(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"goal": "g", "query": "q"}\n')
    assert load_prompts(path)[0].prompt == "g"
    assert load_prompts(path, column="query")[0].prompt == "q"
    assert load_prompts("anchors", column="query") == load_prompts("anchors")


@pytest.mark.parametrize("head", ["Goal,Category", "PROMPT,kind of", "id,Prompt"])
def test_case_makes_no_difference_to_a_column(head: str, tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text(f"{head}\nask,ask\n")
    assert load_prompts(path)[0].prompt == "ask"
    assert load_prompts(path, column=head.split(",")[1].upper())[0].prompt == "ask"


@pytest.mark.parametrize(
    ("name", "content", "there"),
    [
        ("set.csv", "Behavior,BehaviorID\nDo it,x\n", "'Behavior', 'BehaviorID'"),
        ("set.csv", "prompt;topic\nDo it;x\n", "'prompt;topic'"),
        ("set.jsonl", '{"Behavior": "Do it", "id": 1}\n', "'Behavior', 'id'"),
        ("set.jsonl", "{}\n", "nothing"),
    ],
)
def test_a_file_without_the_column_says_which_it_has(
    name: str, content: str, there: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"{name}, line \d: .*`column`.* has {there}$"):
        load_prompts(path)


def test_a_kind_leaves_the_rows_of_the_other_out(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    rows = [("a", "harmful"), ("b", "harmless"), ("c", ""), ("d", "harmless")]
    path.write_text("".join(f'{{"prompt": "{p}", "kind": "{kind}"}}\n' for p, kind in rows))
    for kind, wanted in ((None, "abcd"), ("harmful", "ac"), ("harmless", "bcd")):
        assert "".join(row.prompt for row in load_prompts(path, kind=kind)) == wanted
    path.write_text('{"prompt": "a", "kind": "harmful"}\n')
    with pytest.raises(ValueError, match="must hold harmless prompts; got none in"):
        load_prompts(path, kind="harmless")
