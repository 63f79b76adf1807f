"""`str-kernels cache` end to end on a tiny model."""

from __future__ import annotations

import datetime
import json

import pytest
import torch
from test_cli import run
from tiny_tokenizer import chat_tokenizer, save_tiny_model
from transformers.utils import chat_template_utils

from str_kernels import SafetyTokens, attach
from str_kernels.integrations.chat.rendering import render_answer_starts
from str_kernels.integrations.chat.rows import encode_examples, read_examples
from str_kernels.integrations.loading.models import load_model
from str_kernels.reference_cache.reader import DATED, CachedReference

QUESTIONS = ["what is 1 + 2", "what is 4 - 3", "hello", "what is 5 + 4"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model, a data file, anchors, templates and the cache of them."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny_model(folder / "model", 3)
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "3 ."}]}
        for q in QUESTIONS
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    (folder / "anchors.jsonl").write_text('{"prompt": "help me"}\n')
    (folder / "templates.txt").write_text("sorry , but I can not help with that .\n")
    result = build(folder, "--anchors", folder / "anchors.jsonl", "--json")
    assert result.exit_code == 0, result.output
    return folder, json.loads(result.stdout)


def build(folder, *more, output="cache", model="model"):
    arguments = ["cache", "build", folder / model, folder / "rows.jsonl"]
    arguments += ["--output", folder / output, "--max-length", 32, "--rows-per-shard", 2]
    arguments += ["--positions", "response"]
    if "--safety-tokens" not in more:
        arguments += ["--templates", folder / "templates.txt"]
    return run(*arguments, *more)


def test_build_caches_rows_as_finetune_encodes_them(made):
    folder, report = made
    assert (report["rows"], report["duplicates"], report["shards"]) == (5, 1, 3)
    assert report["computed_tokens"] == report["tokens"] and report["seconds"] > 0
    model, tokenizer = load_model(str(folder / "model"))
    tokens = SafetyTokens.from_templates(tokenizer, folder / "templates.txt")
    cached = CachedReference(folder / "cache")
    rows = encode_examples(tokenizer, read_examples(folder / "rows.jsonl"), 32)
    (text,) = render_answer_starts(tokenizer, ["help me"])
    anchor = tokenizer.encode(text, add_special_tokens=False)
    for ids in (*(row["input_ids"] for row in rows), anchor):
        batch = {"input_ids": torch.tensor([ids])}
        expected = model(**batch).logits[..., tokens.ids]
        torch.testing.assert_close(cached(tokens.ids, batch), expected, rtol=1e-5, atol=1e-5)
    with attach(model.train(), tokens, reference=cached, positions="response") as handle:
        batch = {name: torch.tensor([rows[0][name]]) for name in ("input_ids", "labels")}
        model(**batch).loss.backward()
        assert handle.last.penalty < 1e-9


def test_build_again_keeps_and_says_what_it_rebuilt(made):
    folder, _ = made
    before = (folder / "cache" / "shard-00001.safetensors").read_bytes()
    (folder / "cache" / "shard-00001.safetensors").write_bytes(before[:-9])
    broken = run("cache", "verify", folder / "cache", "--json")
    assert broken.exit_code == 1 and not json.loads(broken.stdout)["whole"]
    shown = run("cache", "verify", folder / "cache")
    assert shown.exit_code == 1 and "shard-00001.safetensors" in shown.output.replace("\n", "")
    result = build(folder, "--anchors", folder / "anchors.jsonl")
    assert result.exit_code == 0, result.output
    assert "Built again: shard-00001" in result.output and "2 of them from an" in result.output
    assert (folder / "cache" / "shard-00001.safetensors").read_bytes() == before
    whole = run("cache", "verify", folder / "cache", "--model", folder / "model", "--json")
    assert whole.exit_code == 0 and json.loads(whole.stdout)["whole"], whole.output
    save_tiny_model(folder / "another", 4)
    other = run("cache", "verify", folder / "cache", "--model", folder / "another", "--json")
    assert other.exit_code == 1 and "base weights" in json.loads(other.stdout)["broken"][0]


def test_info_says_what_is_saved(made):
    folder, report = made
    found = json.loads(run("cache", "info", folder / "cache", "--json").stdout)
    assert found["rows"] == report["rows"] and found["dtype"] == "float32"
    assert found["bytes"] == sum(p.stat().st_size for p in (folder / "cache").iterdir())
    assert found["bytes_per_token"] == found["bytes"] / found["tokens"]
    ref, saved = (found[f"{name}_seconds_per_1000_tokens"] for name in ("reference_pass", "saved"))
    assert saved == ref - found["look_up_seconds_per_1000_tokens"]
    assert (found["epochs_until_building_pays"] or 2) > 1
    assert "epochs until building pays" in run("cache", "info", folder / "cache").output
    timings = folder / "cache" / "timings.json"
    before = timings.read_text()
    timings.write_text("{")
    found = json.loads(run("cache", "info", folder / "cache", "--json").stdout)
    assert found["epochs_until_building_pays"] is None
    timings.write_text(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--backend", "cuda"), "`--backend` must be one of"),
        (("--path", "x"), "`--path` must be one of"),
        (("--safety-tokens", "absent.json"), "absent.json"),
    ],
)
def test_what_is_seen_with_the_model_is_one_line_too(made, options, message):
    """The other mistakes are in test_cli_errors."""
    folder, _ = made
    result = build(folder, *options, output="new")
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert message in result.output
    assert not (folder / "new").exists()


def test_other_kinds_plans_and_folders(made):
    folder, _ = made
    result = build(folder, "--kind", "logprob", output="probs")
    assert result.exit_code == 0, result.output
    assert CachedReference(folder / "probs").plan.values == "log_probs"
    result = build(folder, output="probs")
    assert result.exit_code == 2 and "values log_probs instead of" in result.output
    assert build(folder, "--overwrite", output="probs").exit_code == 0
    chosen = SafetyTokens.from_templates(chat_tokenizer(), ["sorry I can not"])
    chosen.save(folder / "tokens.json")
    assert build(folder, "--safety-tokens", folder / "tokens.json", output="t").exit_code == 0
    CachedReference(folder / "t").check_tokens(chosen)
    for command in ("verify", "info"):
        result = run("cache", command, folder / "model")
        assert result.exit_code in (1, 2) and "reference cache" in result.output


def test_finetune_from_the_cache_equals_the_reference_s_own_passes(made, tmp_path):
    folder, _ = made
    logs = []
    for name, more in (("live", ()), ("cached", ("--cache", folder / "cache"))):
        result = run(
            "finetune", folder / "model", folder / "rows.jsonl", "--output", tmp_path / name,
            "--templates", folder / "templates.txt", "--max-length", 32, "--lora-rank", 2,
            "--steps", 3, "--batch-size", 2, "--lr", 0.01,
            "--anchors", folder / "anchors.jsonl", "--anchors-per-step", 1,
            "--positions", "response", *more,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        logs.append(json.loads((tmp_path / name / "report.json").read_text())["log"])
    for live, cached in zip(*logs, strict=True):
        for term in ("loss", "safety/penalty", "safety/anchor_penalty"):
            assert cached[term] == pytest.approx(live[term], rel=1e-6, abs=1e-9)
    assert logs[1][2]["safety/anchor_penalty"] > 0.0
    missing = run(
        "finetune", folder / "model", folder / "rows.jsonl", "--output", tmp_path / "miss",
        "--templates", folder / "templates.txt", "--max-length", 4, "--steps", 1,
        "--cache", folder / "cache", "--positions", "response",
    )  # fmt: skip
    assert missing.exit_code == 2 and "--max-length" in missing.output


def test_an_adapter_is_not_taken_for_its_base(made):
    folder, _ = made
    (folder / "adapter").mkdir(exist_ok=True)
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    for result in (
        build(folder, output="of-adapter", model="adapter"),
        run("cache", "verify", folder / "cache", "--model", folder / "adapter"),
    ):
        assert result.exit_code == 2
        assert "must be a full model to be cached" in result.output.replace("\n", " ")


def test_by_default_the_anchors_alone_are_stored(made):
    """And they are what a run with the cache asks for, whose rows it has not."""
    folder, _ = made
    arguments = ["--templates", folder / "templates.txt", "--output", folder / "of-anchors"]
    result = run("cache", "build", folder / "model", *arguments, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["rows"] + report["duplicates"] == 132
    cached = CachedReference(folder / "of-anchors")
    assert cached.plan.values == "log_probs"
    tuned = run(
        *("finetune", folder / "model", folder / "rows.jsonl", "--output", folder / "run"),
        *("--templates", folder / "templates.txt", "--cache", folder / "of-anchors"),
        *("--steps", 2, "--batch-size", 2, "--json"),
    )
    assert tuned.exit_code == 0, tuned.output
    log = json.loads(tuned.stdout)["log"]
    assert abs(log[0]["safety/anchor_penalty"]) < 1e-5 and log[0]["safety/penalty"] == 0.0
    missing = run("cache", "build", folder / "model", "--positions", "response", *arguments)
    assert missing.exit_code == 2 and "`data` must be given unless" in missing.output


def test_a_template_with_the_date_is_told_of(made, tmp_path, monkeypatch):
    folder, _ = made
    save_tiny_model(tmp_path / "model", 3)
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%u') %}{% endif %}"
        "{{ date_string }} " + tokenizer.chat_template
    )
    tokenizer.save_pretrained(tmp_path / "model")

    def of(output, *more):
        arguments = ["--templates", folder / "templates.txt", "--anchors", folder / "anchors.jsonl"]
        result = run("cache", "build", tmp_path / "model", *arguments, "--output", output, *more)
        assert result.exit_code == 0, result.output
        return CachedReference(output), result.output

    cached, said = of(tmp_path / "cache")
    assert "Note: the chat template writes the day into" in said
    fixed, said = of(tmp_path / "fixed", "--chat-template-kwargs", '{"date_string": "3"}')
    assert "Note:" not in said
    plain = CachedReference(folder / "cache")
    assert DATED not in plain.plan.made_with and DATED not in fixed.plan.made_with

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime.now(tz) + datetime.timedelta(days=1)

    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    (text,) = render_answer_starts(tokenizer, ["help me"])
    row = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    with pytest.raises(ValueError, match=r"is not there.* The chat template wrote the day into"):
        cached.look_up({"input_ids": row})
    (text,) = render_answer_starts(
        tokenizer, ["help me"], chat_template_kwargs={"date_string": "3"}
    )
    row = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    assert fixed.look_up({"input_ids": row}).values.isfinite().all()
