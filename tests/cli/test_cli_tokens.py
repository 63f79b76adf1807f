"""`str-kernels tokens` end to end on a tiny model that refuses: files, tables, JSON, errors."""

from __future__ import annotations

import json

import pytest
from taught_model import HARMFUL, HARMLESS, SHORT, taught_model
from tiny_tokenizer import chat_tokenizer
from typer.testing import CliRunner

from str_kernels import SafetyTokens
from str_kernels.cli import app
from str_kernels.integrations.tokens.builders import from_contrast


def run(*arguments, width=200):
    return CliRunner().invoke(
        app, ["tokens", *map(str, arguments)], env={"COLUMNS": str(width), "NO_COLOR": "1"}
    )


@pytest.fixture(scope="module")
def taught():
    return taught_model()


@pytest.fixture(scope="module")
def model(taught, tmp_path_factory):
    folder = tmp_path_factory.mktemp("taught")
    for part in taught:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer_only(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    chat_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [
        *({"kind": "harmful", "prompt": prompt} for prompt in HARMFUL + SHORT),
        *({"kind": "harmless", "prompt": prompt} for prompt in HARMLESS),
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def templates(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text("# ours\nsorry , I can not\nI can not help\n")
    return path


def test_templates_need_no_model_and_nothing_is_overwritten_unasked(
    tokenizer_only, templates, tmp_path
):
    output = tmp_path / "new" / "tokens.json"
    given = ("build", tokenizer_only, "--output", output, "--templates", templates)
    result = run(*given)
    assert result.exit_code == 0, result.output
    tokens = SafetyTokens.load(output, chat_tokenizer())
    assert list(tokens.pieces) == ["sorry", ",", "I", "can", "not", "help"]
    assert "6 tokens: templates of templates.txt (2 sentences" in result.stdout
    row = next(line for line in result.stdout.splitlines() if "'help'" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["16", "'help'", "0.5", "-"]
    before = output.read_bytes()
    again = run(*given, "--positions", 1)
    assert again.exit_code == 2 and "`--output` must not exist unless --overwrite" in again.output
    assert output.read_bytes() == before
    assert run(*given, "--positions", 1, "--overwrite").exit_code == 0
    assert list(SafetyTokens.load(output).pieces) == ["sorry", "I"]
    assert [path.name for path in output.parent.iterdir()] == ["tokens.json"]


def test_contrast_is_the_functions_and_the_file_takes_the_kind_it_asks_for(
    model, taught, prompts, tmp_path
):
    output = tmp_path / "tokens.json"
    given = ("--from", "contrast", "--harmful", prompts, "--harmless", prompts)
    options = ("--count", 4, "--positions", 3, "--batch-size", 5, "--dtype", "float32", "--json")
    result = run("build", model, "--output", output, *given, *options)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    truth = from_contrast(*taught, HARMFUL + SHORT, HARMLESS, count=4, positions=3)
    assert printed["ids"] == truth.ids.tolist() and printed["source"] == truth.source
    assert printed["scores"] == pytest.approx(truth.scores, rel=1e-3)  # float32, other batches
    assert printed["id_weights"] == pytest.approx(truth.id_weights.tolist(), rel=1e-3)
    assert (printed["file"], printed["fingerprint"]) == (str(output), truth.fingerprint)
    assert SafetyTokens.load(output).as_dict().items() <= printed.items()


def test_refusals_show_how_far_they_are_and_what_they_found(model, prompts, tmp_path):
    output = tmp_path / "tokens.json"
    result = run("build", model, "--from", "refusals", "--harmful", prompts, "--output", output)
    assert result.exit_code == 0, result.output
    assert "answer harmful prompts" in result.stderr and "12/12" in result.stderr
    assert "the model's 10 refusals of 12 harmful prompts, first 8 positions" in result.stdout
    assert SafetyTokens.load(output).pieces[0] == "I" and f"Written to {output}" in result.stdout


def test_a_model_that_does_not_refuse_is_told_and_nothing_is_written(model, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in SHORT))
    output = tmp_path / "tokens.json"
    result = run("build", model, "--from", "refusals", "--harmful", path, "--output", output)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert "at least 1 prompt that the model refuses; it does so to 0 of 2" in result.output
    assert not output.exists()


def test_random_like_a_file_and_a_corpus(tokenizer_only, templates, tmp_path):
    like, output = tmp_path / "like.json", tmp_path / "control.json"
    made = run("build", tokenizer_only, "--output", like, "--templates", templates)
    assert made.exit_code == 0, made.output
    corpus = tmp_path / "rows.jsonl"
    row = {"prompt": "1 1 1 1 2 2 2 2 sorry sorry can can", "completion": "3"}
    corpus.write_text(json.dumps(row) + "\n")
    given = ("build", tokenizer_only, "--from", "random", "--like", like, "--json")
    result = run(*given, "--output", output, "--corpus", corpus, "--seed", 7)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    safety = SafetyTokens.load(like)
    again = SafetyTokens.random(
        chat_tokenizer(), seed=7, like=safety,
        corpus=[chat_tokenizer().encode(row["prompt"] + " 3 <end>")],
    )  # fmt: skip
    assert printed["ids"] == again.ids.tolist() and "seed 7" in printed["source"]
    assert "as frequent among 14 ids" in printed["source"]
    assert len(printed["ids"]) == len(safety) == len(printed["scores"])
    assert not set(printed["ids"]) & set(safety.ids.tolist())
    result = run(*given, "--output", output, "--overwrite")
    assert result.exit_code == 0 and len(json.loads(result.stdout)["ids"]) == len(safety)
    assert json.loads(result.stdout)["source"] == "random, seed 0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--from", "random"), "`--count` must say how many tokens to draw"),
        (("--from", "random", "--like", "no.json"), "no.json"),
        (("--from", "refusals", "--positions", "0"), "`--positions` must be in [1, 24]"),
        (("--templates", "no.txt"), "no.txt"),
        (("--from", "random", "--count", "0"), "`--count` must be in [1, "),
        (("--from", "random", "--count", "3", "--corpus", "no.jsonl"), "no.jsonl"),
    ],
)
def test_what_is_seen_with_the_model_is_one_line_too(model, tmp_path, options, message):
    """The other mistakes are in test_cli_errors."""
    result = run("build", model, "--output", tmp_path / "tokens.json", *options, width=400)
    assert result.exit_code == 2, result.output
    assert message in result.output and "Traceback" not in result.output
    assert result.stderr.count("error:") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_model_and_rows_of_the_wrong_kind(prompts, tmp_path):
    result = run("build", tmp_path / "nowhere", "--output", tmp_path / "tokens.json")
    assert result.exit_code == 2 and "`model` must be 'builtin', a folder or" in result.output
    prompts.write_text(json.dumps({"kind": "harmless", "prompt": "hello"}))
    given = ("--from", "refusals", "--harmful", prompts, "--output", tmp_path / "tokens.json")
    result = run("build", "never loaded", *given)
    assert result.exit_code == 2 and "`--harmful` must hold harmful prompts" in result.output


def test_pieces_and_names_are_shown_as_they_are(tmp_path):
    path = tmp_path / "[red]tokens.json"
    pieces = ["[bold]x[/bold]", " :smile:", "\n", "é", "\\["]
    SafetyTokens(
        ids=range(5), pieces=pieces, source="[link=x]me[/link]", id_weights=[2, 0, 1, 1, 1]
    ).save(path)
    result = run("show", path)
    assert result.exit_code == 0, result.output
    for shown in ("'[bold]x[/bold]'", "'␣:smile:'", r"'\n'", "'é'", r"'\\['", "[link=x]me[/link]"):
        assert shown in result.stdout, shown
    result = run("compare", path, path)
    assert "'␣:smile:'" in result.stdout and "[red]tokens.json" in result.stdout
    result = run("show", tmp_path / "[red]no.json")
    assert result.exit_code == 2 and "[red]no.json" in result.output


def test_show_verifies_the_tokenizer(tokenizer_only, tmp_path):
    path = tmp_path / "tokens.json"
    tokens = SafetyTokens.from_templates(chat_tokenizer(), ["sorry I can not"])
    tokens.save(path)
    result = run("show", path, "--model", tokenizer_only)
    assert result.exit_code == 0 and "is the one they were made with" in result.stdout
    assert tokens.fingerprint in result.stdout and tokens.tokenizer_hash in result.stdout
    printed = json.loads(run("show", path, "--json").stdout)
    assert printed["fingerprint"] == tokens.fingerprint and printed["verified_with"] is None
    assert tokens.as_dict().items() <= printed.items()
    SafetyTokens(ids=[7], tokenizer_hash="0" * 64, vocab_size=9).save(path)
    assert run("show", path).exit_code == 0  # bare ids have no text
    result = run("show", path, "--model", tokenizer_only)
    assert result.exit_code == 2 and "instead of 9" in result.output
    path.write_text("{}")
    assert run("show", path).exit_code == 2


def test_compare(tmp_path):
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    words = chat_tokenizer()
    SafetyTokens.from_ids(words, [9, 10, 11, 12], scores=[4, 3, 2, 1]).save(one)
    SafetyTokens.from_ids(words, [12, 11, 10, 20], scores=[3, 2, 1, 9]).save(other)
    result = run("compare", one, other)
    assert result.exit_code == 0, result.output
    for shown in ("only in one.json", "only in other.json", "Jaccard 0.60", "-1.00 on the 3 in"):
        assert shown in result.stdout, shown
    assert json.loads(run("compare", one, other, "--json").stdout) == {
        "first": str(one), "second": str(other), "both": [10, 11, 12], "only_first": [9],
        "only_second": [20], "jaccard": 0.6, "rank_correlation": pytest.approx(-1.0),
    }  # fmt: skip
    SafetyTokens.from_ids(words, [9]).save(other)
    assert "not defined" in run("compare", one, other).stdout
    SafetyTokens(ids=[9], tokenizer_hash="0" * 64).save(other)
    result = run("compare", one, other)
    assert result.exit_code == 2 and "`second` must be of the tokenizer of `first`" in result.output
