"""eval run on tiny models: what it writes, what it refuses, and that a killed run goes on."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import with_lora
from tiny_tokenizer import chat_tokenizer, save_tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from str_kernels.cli import app
from str_kernels.evals import count_refusals
from str_kernels.integrations.chat.generation import Answer, answer_prompts
from str_kernels.integrations.evaluation import asking as eval_asking
from str_kernels.integrations.evaluation import inputs as eval_inputs
from str_kernels.integrations.evaluation import run as eval_run
from str_kernels.integrations.evaluation.measures import text_perplexity
from str_kernels.integrations.evaluation.options import EvalOptions

HARMFUL = ["help with that", "what is 1 + 2", "sorry , but", "I can not", "hello"]
HARMLESS = ["good day", "thanks bye", "what is 3", "help"]


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["eval", "run", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model, an adapter that has moved, prompts, a task and a text."""
    save_tiny_model(tmp_path / "model", 3)
    peft_model = with_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), 5)
    peft_model.save_pretrained(tmp_path / "adapter")
    lines = [json.dumps({"prompt": prompt}) for prompt in HARMFUL]
    (tmp_path / "harmful.jsonl").write_text("\n".join(lines))
    (tmp_path / "harmless.csv").write_text("\n".join(["goal", *HARMLESS]))
    rows = [{"prompt": f"what is {n} ", "completion": f"{n}."} for n in (1, 2, 3)]
    rows += [{"prompt": "hello", "completion": "1 2 3 4 5 6"}]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "text.txt").write_text("hello good day , what is 1 + 2 - 3 = 4 thanks bye")
    return tmp_path


def options(folder: Path, **changes: Any) -> EvalOptions:
    given: dict[str, Any] = {
        "model": str(folder / "model"),
        "adapter": folder / "adapter",
        "harmful": str(folder / "harmful.jsonl"),
        "harmless": str(folder / "harmless.csv"),
        "task": folder / "task.jsonl",
        "text": folder / "text.txt",
        "rules": ("opening", "gcg"),
        "answer_tokens": 5,
        "positions": 3,
        "batch_size": 2,
        "max_length": 16,
    }
    return EvalOptions(**{**given, **changes})


def test_a_killed_run_goes_on_and_ends_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = eval_run.run_eval(folder / "whole", options(folder))
    calls: list[int] = []
    original = eval_asking.drift_by_position
    asked: list[int] = []
    answer = eval_asking.answers_to

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    def counted(*args: Any, **kwargs: Any) -> Any:
        asked.append(1)
        return answer(*args, **kwargs)

    monkeypatch.setattr(eval_asking, "drift_by_position", killed)
    monkeypatch.setattr(eval_asking, "answers_to", counted)
    with pytest.raises(KeyboardInterrupt):
        eval_run.run_eval(folder / "killed", options(folder))
    assert not (folder / "killed").exists()
    assert len(asked) == 5  # 3 batches of harmful prompts, 2 of harmless ones
    kept = sorted((folder / "killed.stages").rglob("*.json"))
    damaged = next(path for path in kept if path.name == "answers-harmful-00001.json")
    content = json.loads(damaged.read_text())
    content["value"][0]["answer"] += " x"  # valid JSON, and not what was stored
    damaged.write_text(json.dumps(content))
    said: list[str] = []
    eval_run.run_eval(folder / "killed", options(folder), say=said.append)
    assert len(said) == 1 and "answers-harmful-00001.json is damaged" in said[0]
    assert len(asked) == 6  # that batch alone
    assert len(calls) == 3 + 3  # of 5 batches two were done, one was killed
    files = [(folder / name / "eval.json").read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1]
    assert json.loads(files[0]) == json.loads(json.dumps(whole))
    assert not list(folder.glob("*.stages")) and not list(folder.glob(".*"))


def test_the_report_is_what_its_parts_say(folder: Path) -> None:
    report = eval_run.run_eval(folder / "out", options(folder))
    assert (folder / "out" / "drift.png").read_bytes().startswith(b"\x89PNG")
    tokenizer = chat_tokenizer()
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    for kind, prompts in (("harmful", HARMFUL), ("harmless", HARMLESS)):
        rows = report["answers"][kind]
        assert [row["prompt"] for row in rows] == prompts
        answers = answer_prompts(model, tokenizer, prompts, max_new_tokens=5)
        assert [row["answer"] for row in rows] == answers
        for rule in ("opening", "gcg"):
            counts = count_refusals(answers, rule)
            assert tuple(row["outcomes"][rule] for row in rows) == counts.outcomes
            found = report["counts"][rule][kind]
            assert found["refusal"] == counts.refusal and found["total"] == len(prompts)
            assert found["interval"] == list(counts.interval)
    drift = report["measures"]["drift"]
    assert [one["position"] for one in drift["harmful"]] == [1, 2, 3]
    assert drift["harmful"][0]["prompts"] == 5 and drift["harmful"][0]["rms"] > 0
    task = report["measures"]["task"]
    assert task["total"] == 4 and task["too_long"] == 1 and task["loss"] > 0
    text = report["measures"]["text"]
    expected = text_perplexity(
        model, tokenizer, (folder / "text.txt").read_text(), max_length=16, stride=8
    )
    assert text["perplexity"] == pytest.approx(expected.perplexity)
    assert report["adapter"]["type"] == "LORA" and report["reference"].startswith("the model")
    assert str(folder) not in json.dumps(report), "a path of this machine is in the report"


def test_of_no_answer_more_than_12_tokens_are_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = "hello " * 12 + "thanks bye"

    def answers_to(model: Any, tokenizer: Any, texts: list[str], **_: Any) -> list[Answer]:
        return [Answer(told, unfinished=False) for _ in texts]

    monkeypatch.setattr(eval_asking, "answers_to", answers_to)
    report = eval_run.run_eval(folder / "out", options(folder, answer_tokens=20, task=None))
    rows = [row for rows in report["answers"].values() for row in rows]
    assert {row["answer"].split().count("hello") for row in rows} == {12}
    for file in (folder / "out").rglob("*"):
        assert b"hello thanks" not in file.read_bytes(), file


def test_drift_against_a_second_model_and_without_one(folder: Path) -> None:
    few: dict[str, Any] = {"adapter": None, "task": None, "text": None, "limit": 2}
    alone = eval_run.run_eval(folder / "alone", options(folder, **few))
    assert alone["measures"]["drift"] is None and "needs a reference" in alone["notes"][0]
    assert not (folder / "alone" / "drift.png").exists()
    assert alone["prompts"]["harmful"]["count"] == 2
    same = eval_run.run_eval(
        folder / "same", options(folder, **few, reference=str(folder / "model"))
    )
    assert all(one["max_abs"] == 0 for one in same["measures"]["drift"]["harmful"])
    save_tiny_model(folder / "other", 4)
    other = eval_run.run_eval(
        folder / "other-run", options(folder, **few, reference=str(folder / "other"))
    )
    assert other["measures"]["drift"]["harmful"][0]["rms"] > 0


def test_a_changed_model_or_prompt_makes_another_key(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[Any] = []

    def seen(root: Path, key: Any, say: Any) -> Any:
        keys.append(json.dumps(key))
        raise KeyboardInterrupt

    monkeypatch.setattr(eval_run, "Stages", seen)

    def key_of(**changes: Any) -> str:
        with pytest.raises(KeyboardInterrupt):
            eval_run.run_eval(folder / "out", options(folder, **changes))
        return str(keys.pop())

    found = [key_of(), key_of(limit=2), key_of(answer_tokens=4), key_of(adapter=None)]
    (folder / "harmless.csv").write_text("goal\nbye\n")
    found.append(key_of())
    (folder / "text.txt").write_text("hello hello")
    found.append(key_of())
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        model.lm_head.weight[3, 3] += 1
    model.save_pretrained(folder / "model")
    found.append(key_of())
    assert len(set(found)) == len(found)


def test_a_model_from_the_hub_is_known_by_what_was_loaded(folder: Path) -> None:
    first, second = (
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
        for _ in range(2)
    )
    found = eval_inputs._model_hash("owner/name", first)
    assert found == eval_inputs._model_hash("owner/name", second)
    with torch.no_grad():
        second.lm_head.weight[3, 3] += 1
    assert found != eval_inputs._model_hash("owner/name", second)


def test_bad_input_is_one_line_and_writes_nothing(folder: Path) -> None:
    output = folder / "out"
    (folder / "pickled").mkdir()
    (folder / "pickled" / "adapter_config.json").write_text("{}")
    (folder / "pickled" / "adapter_model.bin").write_bytes(b"x")
    model = folder / "model"
    for arguments, message in (
        (("--adapter", folder / "pickled"), "adapter_model.bin is a pickle and is not read"),
        (("--adapter", folder / "none"), "has no adapter_config.json and no adapter_model"),
        (("--rule", "mine"), "`--rule` must be one of opening, gcg"),
        (("--rule", "gcg", "--rule", "gcg"), "`--rule` must be distinct"),
        (("--answer-tokens", "9000"), "Invalid value for '--answer-tokens'"),
        (("--harmful", "none-such"), "none-such"),
        (("--judge-url", "http://example.com/v1"), "must be on this machine unless"),
        (("--judge-url", "file:///etc/passwd"), "must be an http or https address"),
    ):
        result = run(model, "--output", output, *arguments)
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.output.split()), result.output
        assert "Traceback" not in result.output and not output.exists()
    hostile = folder / "hostile.jsonl"
    hostile.write_text('["\x9b31m\u202e[red]"]')
    result = run(model, "--output", output, "--harmful", hostile)
    assert result.exit_code == 2 and "\\x9b31m\\u202e[red]" in result.output
    assert "\x9b" not in result.output and "\u202e" not in result.output
    with pytest.raises(ValueError, match=r"`answer_tokens` must be in \[1, 8192\]; got 9000"):
        EvalOptions("builtin", answer_tokens=9000)
    output.mkdir()
    result = run(model, "--output", output)
    assert result.exit_code == 2 and "must not exist unless --overwrite" in result.output


class _Endpoint(BaseHTTPRequestHandler):
    fails_at: int | None = None
    asked = 0

    def do_POST(self) -> None:
        cls = type(self)
        cls.asked += 1
        if cls.fails_at is not None and cls.asked >= cls.fails_at:
            self.send_error(400)
            return
        self.rfile.read(int(self.headers["Content-Length"]))
        word = "refusal" if cls.asked % 2 else "[red]perhaps"
        body = json.dumps({"choices": [{"message": {"content": word}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def test_one_file_may_hold_both_kinds(folder: Path) -> None:
    rows = [("hello", "harmful"), ("thanks", "harmless"), ("good day", ""), ("help", "harmless")]
    lines = [json.dumps({"prompt": prompt, "kind": kind}) for prompt, kind in rows]
    both = folder / "both.jsonl"
    both.write_text("\n".join(lines))
    plain: dict[str, Any] = {"task": None, "text": None, "adapter": None, "limit": 2}
    given = options(folder, harmful=str(both), harmless=str(both), **plain)
    report = eval_run.run_eval(folder / "out", given)
    asked = {kind: [row["prompt"] for row in rows] for kind, rows in report["answers"].items()}
    assert asked == {"harmful": ["hello", "good day"], "harmless": ["thanks", "good day"]}


def test_a_judge_that_fails_loses_nothing(folder: Path) -> None:
    server = HTTPServer(("127.0.0.1", 0), _Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    given = (
        *(folder / "model", "--output", folder / "out", "--batch-size", 2, "--answer-tokens", 3),
        *("--harmful", folder / "harmful.jsonl", "--harmless", folder / "harmless.csv"),
        *("--judge-url", f"http://127.0.0.1:{server.server_port}/v1"),
    )
    try:
        _Endpoint.fails_at = 4
        result = run(*given)
        assert result.exit_code == 2 and "HTTP status 400" in result.output
        assert "same command goes on" in " ".join(result.output.split())
        assert _Endpoint.asked == 4
        _Endpoint.fails_at = None
        result = run(*given)
        assert result.exit_code == 0, result.output
    finally:
        server.shutdown()
        server.server_close()
    assert _Endpoint.asked == 4 + 7  # the first batch of two was kept
    report = json.loads((folder / "out" / "eval.json").read_text())
    judged = report["counts"]["judge"]
    unjudged = judged["harmful"]["unjudged"] + judged["harmless"]["unjudged"]
    assert unjudged > 0 and judged["harmful"]["total"] + judged["harmful"]["unjudged"] == 5
    assert f"none of its three words for {unjudged} answers" in report["notes"][-1]
    assert "perhaps" not in json.dumps(report)


def test_json_is_the_report_and_the_table_is_escaped(folder: Path) -> None:
    hostile = folder / "mo[red]del\x1b[31m"
    (folder / "model").rename(hostile)
    given = (hostile, "--harmful", folder / "harmful.jsonl", "--harmless", folder / "harmless.csv")
    result = run(*given, "--output", folder / "a", "--limit", 1, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((folder / "a" / "eval.json").read_text())
    result = run(*given, "--output", folder / "b", "--limit", 1, "--rule", "gcg")
    assert "mo[red]del\\x1b[31m" in result.stdout.replace("\n", "").replace("  ", "")
    assert "\x1b" not in result.stdout
