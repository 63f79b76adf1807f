"""The command line end to end on a tiny model: files, JSON, errors, and what is left behind."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open
from tiny_tokenizer import chat_tokenizer, save_tiny_model
from typer.testing import CliRunner

from str_kernels import SafetyTokens, doctor
from str_kernels.cli import app

ROW = {
    "messages": [
        {"role": "user", "content": "what is 1 + 2"},
        {"role": "assistant", "content": "1 + 2 = 3"},
    ]
}


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def model(tmp_path):
    return save_tiny_model(tmp_path / "model", 3)


@pytest.fixture
def data(tmp_path):
    pytest.importorskip("trl")  # the oldest releases of the matrix are tested without it
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(ROW) + "\n") * 6)
    return path


@pytest.fixture
def templates(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text("# ours\nsorry , but I can not help with that .\n")
    return path


SMALL = ("--steps", "3", "--batch-size", "2", "--max-length", "32", "--lora-rank", "2")


def test_finetune_writes_the_folder(model, data, templates, tmp_path):
    output = tmp_path / "run"
    result = run("finetune", model, data, "--output", output, "--templates", templates, *SMALL)
    assert result.exit_code == 0, result.output
    report = json.loads((output / "report.json").read_text())
    assert [entry["step"] for entry in report["log"]] == [1, 2, 3]
    for name in ("loss", "safety/ce", "safety/penalty", "safety/max_drift"):
        assert name in report["log"][0]
        assert name in result.output
    assert report["log"][0]["safety/penalty"] == 0.0  # step 0: nothing has moved
    tokens = SafetyTokens.load(output / "safety_tokens.json", chat_tokenizer())
    assert "".join(tokens.pieces).startswith("sorry,butIcan")
    with safe_open(output / "adapter_model.safetensors", "pt") as adapter:
        assert any("lora_B" in key for key in adapter.keys())
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(output.glob("*.bin")) and not list(output.glob("*.pt"))  # no pickles
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_finetune_with_anchors(model, data, templates, tmp_path):
    output, file = tmp_path / "run", tmp_path / "anchors.jsonl"
    file.write_text('{"prompt": "help me"}\n{"kind": "harmless", "prompt": "good day"}\n')
    options = ("--anchors", file, "--anchors-per-step", 1, "--harmless-anchors-per-step", 1)
    given = ("--output", output, "--templates", templates, *SMALL, "--lr", "0.01")
    result = run("finetune", model, data, *given, *options)
    assert result.exit_code == 0, result.output
    assert "safety/anchor_penalty" in result.output
    report = json.loads((output / "report.json").read_text())
    assert report["anchors"]["rows"] == 2 and report["anchors"]["harmless_per_step"] == 1
    penalties = [entry["safety/anchor_penalty"] for entry in report["log"]]
    # log-probabilities: the normalisers of two products differ in their last bits
    assert abs(penalties[0]) < 1e-6 < penalties[2]
    wrong = run("finetune", model, data, "--output", tmp_path / "no", "--anchors", "none-such")
    assert wrong.exit_code == 2 and "none-such" in wrong.output
    assert not (tmp_path / "no").exists()


def test_json_and_given_tokens(model, data, tmp_path):
    chosen = SafetyTokens.from_templates(chat_tokenizer(), ["sorry I can not"])
    chosen.save(tmp_path / "tokens.json")
    output = tmp_path / "run"
    given = ("--safety-tokens", tmp_path / "tokens.json", "--positions", "2", "--json", *SMALL)
    result = run("finetune", model, data, "--output", output, *given)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["safety_tokens"]["count"] == len(chosen)
    assert printed["positions"] == 2
    again = run("finetune", model, data, "--output", output, *SMALL)
    assert again.exit_code == 2 and "`--output`" in again.output
    result = run("finetune", model, data, "--output", output, "--overwrite", "--json", *SMALL)
    assert result.exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--weight", "-1"), "`--weight` must be finite and >= 0; got -1"),
        (("--kind", "l1"), "`--kind` must be one of mse, huber"),
        (("--kind", "huber", "--delta", "0"), "`--delta` must be finite and > 0; got 0"),
        (("--lr", "0"), "`--lr` must be finite and > 0"),
        (("--positions", "some"), "`--positions` must be"),
        (("--dtype", "int8"), "`--dtype` must be one of"),
        (("--backend", "cuda"), "`--backend` must be one of"),
        (("--safety-tokens", "absent.json"), "absent.json"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(
    model, data, templates, tmp_path, options, message
):
    output = tmp_path / "run"
    given = () if "--safety-tokens" in options else ("--templates", templates)
    result = run("finetune", model, data, "--output", output, *SMALL, *given, *options)
    assert result.exit_code == 2
    assert message in result.output and "Traceback" not in result.output
    assert not output.exists()


def test_a_broken_row_stops_before_anything_is_loaded(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + '\n{"messages": []}\n')
    result = run("finetune", "no-such-model", path, "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert "line 2" in result.output and not (tmp_path / "run").exists()


def test_a_foreign_tokenizer_and_a_missing_model(model, data, tmp_path):
    foreign = SafetyTokens(ids=[3], vocab_size=9, tokenizer_hash="0" * 64, pieces=["x"])
    foreign.save(tmp_path / "foreign.json")
    result = run("finetune", model, data, "--safety-tokens", tmp_path / "foreign.json", *SMALL)
    assert result.exit_code == 2 and "instead of 9" in result.output
    result = run("finetune", tmp_path / "nowhere", data, *SMALL, "--output", tmp_path / "run")
    assert result.exit_code == 2 and "`model` must be" in result.output


def test_doctor_reports_and_fails_on_a_wrong_backend(monkeypatch):
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    statuses = {check["backend"]: check["status"] for check in found["devices"][0]["backends"]}
    assert found["healthy"] and statuses.pop("compiled") in ("ok", "unavailable")
    assert statuses == dict.fromkeys(("torch", "triton"), "ok")
    assert found["devices"][0]["auto"] == "torch" and found["versions"]["torch"] != "missing"
    assert "auto picks" in run("doctor").output
    original = doctor.safety_linear_cross_entropy

    def wrong(*args, backend, **kwargs):
        terms = original(*args, backend=backend, **kwargs)
        return terms._replace(loss=terms.loss * 1.001) if backend == "torch" else terms

    monkeypatch.setattr(doctor, "safety_linear_cross_entropy", wrong)
    assert run("doctor").exit_code == 1


@pytest.mark.parametrize("place", [0, 1, 2])
def test_doctor_sees_a_nan_in_any_of_what_it_compares(place, monkeypatch):
    original = doctor._loss_and_gradient

    def broken(inputs, backend):
        found = original(inputs, backend)
        if backend == "torch":
            found[place] = found[place] * float("nan")
        return found

    monkeypatch.setattr(doctor, "_loss_and_gradient", broken)
    found = {one.backend: one for one in doctor.check_backends("cpu")}
    assert found["torch"].status == "wrong" and "nan" in found["torch"].detail
    assert found["triton"].status == "ok"


@pytest.mark.parametrize(
    "command",
    [
        *("finetune", "demo", "study", "doctor", "plan", "export", "eval run", "eval report"),
        *("cache build", "cache verify", "cache info"),
        *("tokens build", "tokens show", "tokens compare"),
    ],
)
def test_every_command_has_help_and_json(command):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0 and "--json" in result.output
