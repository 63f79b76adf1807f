"""`finetune` as a run: TRL's options through it, what it writes, and what it refuses."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import save_tiny_model
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from str_kernels.cli import app
from str_kernels.integrations.finetune.run_folder import RunFolder

pytest.importorskip("trl")  # the oldest releases of the matrix are tested without it
from finetune_cases import FLAGS, asked, data, given, losses, model, run

from str_kernels.integrations.finetune import run as finetune_module
from str_kernels.integrations.finetune.options import read_options
from str_kernels.integrations.finetune.report import long_context_notes
from str_kernels.integrations.finetune.run import prepare

__all__ = ["asked", "data", "given", "model"]  # fixtures


def test_epochs_and_accumulation(given: dict[str, Any]) -> None:
    report = run(given, steps=None, epochs=1.5, accumulation=2)
    assert report["steps"] == 3 and len(report["log"]) == 3
    assert report["log"][0]["safety/max_drift"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        ("--use_dora",),
        ("--lora_target_modules", "q_proj", "v_proj"),
        ("--full",),
        ("--checkpointing",),
        ("--packing", "--packing_strategy", "wrapped"),
        ("--optim", "sgd", "--weight-decay", "0.1", "--lr_scheduler_type", "cosine"),
        ("--positions", "response", "--weight", "0.5"),
        ("--weight", "0"),
    ],
    ids=lambda flags: flags[0].strip("-"),
)
def test_what_trl_has_goes_through(given: dict[str, Any], flags: tuple[str, ...]) -> None:
    report = run(given, *flags, lr=0.1, steps=8)
    assert min(losses(report)[4:]) < losses(report)[0]
    folder = Path(given["output"])
    weights = "model.safetensors" if flags == ("--full",) else "adapter_model.safetensors"
    assert (folder / weights).exists() and report["adapter"] == (flags != ("--full",))
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth")]


@pytest.mark.parametrize(
    ("more", "flags", "message"),
    [
        ({"steps": 2, "epochs": 2}, (), "`max_steps` must be left out with `num_train_epochs`"),
        ({"steps": 0}, (), "`max_steps` must be >= 1; got 0"),
        ({"steps": 2.5}, (), "`max_steps` must be valid; got an invalid int value: '2.5'"),
        ({"batch_size": [1, 2]}, (), "`per_device_train_batch_size` must be|an option before"),
        ({"steps": None, "epochs": 0}, (), "`num_train_epochs` must be finite and > 0"),
        ({"lora_alpha": 0}, (), "`lora_alpha` must be finite and > 0; got 0"),
        ({"full": True}, ("--load_in_4bit",), "`full` must be off for weights in 4 or 8 bits"),
        ({}, ("--output_dir", "x"), "`output_dir` must be left out: --output is the folder"),
        ({}, ("--assistant_only_loss",), "`assistant_only_loss` must be left out"),
        ({}, ("--eval_strategy", "epoch"), "`eval_strategy` must have rows"),
        ({"early_stopping": 1}, (), "`early_stopping` must have `eval_data`"),
        (
            {"early_stopping": 1, "eval_fraction": 0.5},
            ("--save_steps", "2", "--eval_steps", "1"),
            "`save_steps` must be that of `eval_steps`",
        ),
        ({"templates": "absent.txt"}, (), "`safety_templates` must be a file; got absent.txt"),
        ({}, ("--lora_target_modules", "nonsense"), "Target modules .*nonsense"),
        ({"eval_data": "absent.jsonl"}, (), "`eval_data` must be a readable file"),
        ({"data_split": "train"}, (), "`data_split` must be left out for a file"),
        ({"cache": "absent"}, (), "`safety_cache` must"),
    ],
)
def test_what_is_wrong_is_said_by_name_and_writes_nothing(
    given: dict[str, Any], more: dict[str, Any], flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(given, *flags, **more)
    assert not Path(given["output"]).exists()


def test_long_context_is_one_word(given: dict[str, Any], data: Path) -> None:
    shapes = []

    def watch(model: Any) -> None:
        hook = lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape)  # noqa: E731
        model.register_forward_pre_hook(hook, with_kwargs=True)

    with pytest.MonkeyPatch.context() as patch:
        load = finetune_module.load_model

        def watched(*args: Any, **kwargs: Any) -> Any:
            model, tokenizer = load(*args, **kwargs)
            watch(model)
            return model, tokenizer

        patch.setattr(finetune_module, "load_model", watched)
        report = run(given, long_context=True, batch_size=None, steps=2, eval_data=str(data))
    (note,) = (note for note in report["notes"] if note.startswith("long context"))
    assert "checkpointing on, attention sdpa, 1 row(s) a forward, 8 forward(s) a step" in note
    assert re.search(r"rows of up to \d+ tokens", note)  # what the model takes
    # of the rows one at a time, in evaluation too; more are the anchors, which are short
    rows = [shape[0] for shape in shapes]
    assert rows.count(1) >= 16 and set(rows) <= {1, 4}


def test_long_context_leaves_the_step_as_it_was(given: dict[str, Any]) -> None:
    def rows_of_a_step(*flags: str, **options: Any) -> tuple[int, int]:
        training = read_options({"model": "m", "data": "d", **options}, [*FLAGS, *flags]).training
        return training.per_device_train_batch_size, training.gradient_accumulation_steps

    assert rows_of_a_step() == (8, 1)
    assert rows_of_a_step(long_context=True) == (1, 8)
    assert rows_of_a_step(long_context=True, batch_size=4) == (4, 2)
    assert rows_of_a_step(long_context=True, accumulation=2) == (1, 2)
    chosen = {"attention": "eager", "max_length": 512, "long_context": True}
    options = read_options(
        {**chosen, "model": "m", "data": "d"}, [*FLAGS, "--no_gradient_checkpointing"]
    )
    assert options.model.attn_implementation == "eager" and options.training.max_length == 512
    assert not options.training.gradient_checkpointing
    assert (
        read_options({"model": "m", "data": "d", "long_context": True}, FLAGS).training.max_length
        is None
    )
    with_bytes = read_options({"model": "m", "data": "d"}, [*FLAGS, "--chunk-bytes", "4096"])
    assert with_bytes.training.safety_chunk_bytes == 4096


@pytest.mark.parametrize(
    ("changed", "note"),
    [
        ({"_attn_implementation": "eager"}, "eager attention"),
        ({"sliding_window": 16}, "the mask of a sliding window of 16 tokens"),
        ({"packing": True}, "the mask of packed or padded rows"),
        ({}, None),
    ],
)
def test_what_grows_with_the_square_is_said(changed: dict[str, Any], note: str | None) -> None:
    training = read_options({"model": "m", "data": "d", "long_context": True}, FLAGS).training
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2,
        )
    )  # fmt: skip
    for name, value in changed.items():
        setattr(training if hasattr(training, name) else model.config, name, value)
    notes = long_context_notes(training, model)[1:]
    wanted = "takes memory that grows with the square of the rows' length"
    assert notes == ([] if note is None else [f"{note} {wanted}"])


def test_the_command_lets_torch_align_large_blocks(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "x")  # which is put back
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    runner = CliRunner()
    runner.invoke(app, ["finetune", "absent", "absent.jsonl"])
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    runner.invoke(app, ["finetune", "absent", "absent.jsonl"])
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"  # the user's


def test_nothing_of_others_is_replaced(given: dict[str, Any]) -> None:
    output = Path(given["output"])
    run(given, "--full")
    again = {**given, "model": str(output)}
    with pytest.raises(ValueError, match=r"`output` must not be what is read"):
        run(again, overwrite=True)
    theirs = {**given, "output": str(output) + "-2"}
    real = RunFolder.finish

    def meanwhile(self: Any, **options: Any) -> None:
        self.output.mkdir()
        (self.output / "thesis.txt").write_text("x")
        real(self, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "finish", meanwhile)
        with pytest.raises(ValueError, match=r"The finished run is in .*run-2.unfinished"):
            run(theirs)
    assert (Path(theirs["output"]) / "thesis.txt").read_text() == "x"
    third = {**given, "output": str(output) + "-3"}
    with RunFolder(Path(third["output"])).lock(), pytest.raises(ValueError, match="another run"):
        run(third)
    assert not list(output.parent.glob(".*.lock"))


def test_an_end_that_is_there_is_not_written_twice(given: dict[str, Any]) -> None:
    Path(given["data"]).write_text('{"prompt": "hello", "completion": "good day <end>"}\n')
    options = read_options({**given, "batch_size": 1}, FLAGS)
    (row,) = prepare(options).train.rows
    assert row["input_ids"].count(1) == 1 and row["labels"][-1] == 1


def test_evaluation_early_stopping_and_the_best_is_kept(given: dict[str, Any]) -> None:
    flags = ("--eval_steps", "1", "--keep_checkpoints")
    report = run(given, *flags, eval_fraction=0.25, early_stopping=1, lr=3.0, steps=12)
    evaluated = [entry["eval_loss"] for entry in report["evaluations"]]
    assert report["data"]["rows"] == 6 and report["steps"] < 12
    assert len(evaluated) >= 2 and min(evaluated) != evaluated[-1]
    names = {path.name for path in Path(given["output"]).glob("checkpoint-*")}
    assert f"checkpoint-{1 + evaluated.index(min(evaluated))}" in names


def test_a_yaml_file_and_flags_over_it(given: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {given['model']}\ndata: {given['data']}\noutput: {given['output']}\n"
        f"safety_templates: {given['templates']}\nmax_steps: 2\nlora-rank: 4\nuse_cpu: true\n"
        "lora_target_modules: [q_proj]\nlearning_rate: 1e-3\n"
    )
    flags = ["--config", str(config), "--steps", "1", "--json"]
    result = CliRunner().invoke(app, ["finetune", *flags])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["steps"] == 1 and report["options"]["model"]["lora_r"] == 4
    assert report["options"]["training"]["learning_rate"] == 1e-3
    config.write_text(config.read_text() + "dry_run: yes\noverwrite: yes\nepochs: 2\n")
    config.write_text(config.read_text().replace("max_steps: 2\n", ""))
    result = CliRunner().invoke(app, ["finetune", "--use_cpu", "--config", str(config), "--json"])
    assert json.loads(result.stdout)["steps"] == 2 and "first_row" in result.stdout  # a plan
    config.write_text("lora_rnak: 3\n")
    result = CliRunner().invoke(app, ["finetune", "m", "d", "--config", str(config)])
    assert result.exit_code == 2 and "there is no option `--lora_rnak`" in result.output
    result = CliRunner().invoke(app, ["finetune", "m", "d", "--optimm", "sgd"])
    assert result.exit_code == 2 and "the nearest is `--optim`" in result.output
    result = CliRunner().invoke(app, ["finetune", "--optim", "sgd", "m", "d"])
    assert result.exit_code == 2 and "MODEL and DATA must come before" in result.output


def test_what_the_folder_says(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    report = run(given, eval_refusals=3)
    folder = Path(given["output"])
    card = (folder / "README.md").read_text()
    assert "safety tokens by coarse_kl with weight 0.1" in card
    assert "2 harmful and 2 harmless prompts a step" in card
    assert card.count("to") and report["refusals"]["before"]["harmful"]["total"] == 3
    assert {"tokenizer.json", "safety_tokens.json", "report.json", "curves.png"} <= {
        path.name for path in folder.iterdir()
    }
    assert json.loads((folder / "report.json").read_text()) == report
    assert not folder.with_name("run.unfinished").exists()
    plain = run(given, weight=0.0, overwrite=True)
    assert "nothing, it is plain fine-tuning" in (folder / "README.md").read_text()
    assert plain["refusals"] == {}


def test_going_on_from_an_adapter_holds_it_at_its_start(given: dict[str, Any]) -> None:
    first = run(given, steps=8)
    again = {**given, "model": given["output"], "output": given["output"] + "-2"}
    with pytest.raises(ValueError, match="`lora_r` must be left out for an adapter"):
        run(again)
    del again["lora_rank"]
    second = run(again)
    assert second["log"][0]["loss"] < losses(first)[0]
    assert second["log"][0]["safety/max_drift"] == pytest.approx(0, abs=1e-5)
    assert second["reference"] == "the adapter as it was before training"
    names = {path.name for path in Path(again["output"]).iterdir()}
    assert "safety_reference" not in names  # it is not of the model


def test_a_dry_run_writes_nothing(given: dict[str, Any], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    arguments = [given["model"], given["data"], "--templates", given["templates"], "--epochs", "2"]
    output = ["--output", given["output"], "--dry-run", "--batch-size", "3", *FLAGS]
    result = CliRunner().invoke(app, ["finetune", *arguments, *output, "--json"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert (plan["rows"], plan["steps"], plan["rows_of_a_step"]) == (8, 6, 3)
    assert plan["epochs"] == 2
    assert ">>>what is 1 bye <end><<<" in plan["first_row"] and plan["memory_gib"] is not None
    assert sorted(tmp_path.rglob("*")) == before
    shown = CliRunner().invoke(app, ["finetune", *arguments, *output])
    assert shown.exit_code == 0 and "Plan, nothing was trained" in shown.output
    assert "1/1" in shown.stderr and "0/1" not in shown.stderr  # the last stage is done too


def test_qlora_trains_with_and_without_evaluation(tmp_path: Path, data: Path, asked: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is of the extra 'dev', and for Linux")
    model = save_tiny_model(tmp_path / "wide", 3, hidden_size=128, intermediate_size=256)
    given = {
        "model": str(model), "data": str(data), "templates": str(asked), "steps": 3,
        "batch_size": 2, "max_length": 32, "lr": 1e-2,
    }  # fmt: skip
    flags = ("--load_in_4bit",)
    for more in ({}, {"eval_fraction": 0.25}):
        output = str(tmp_path / f"run-{len(more)}")
        report = run({**given, "output": output}, *flags, "--eval_steps", "1", **more)
        assert all(entry["grad_norm"] > 0 for entry in report["log"])
        assert losses(report)[-1] < losses(report)[0]
        assert len(report["evaluations"]) == 3 * len(more)


def test_the_finished_folder_is_pushed(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from str_kernels.integrations.finetune import report as finetune_report

    pushed: list[Any] = []

    class Api:
        def __init__(self, token: str | None) -> None:
            pushed.append(token)

        def create_repo(self, name: str, **options: Any) -> Any:
            pushed.append((name, options))
            return type("Url", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, **options: Any) -> None:
            pushed.append(
                (options["repo_id"], sorted(p.name for p in options["folder_path"].iterdir()))
            )

    monkeypatch.setattr(finetune_report, "HfApi", Api)
    run(given, "--push_to_hub", "--hub_token", "secret", "--hub_private_repo", "true")
    token, (name, options), (repo, files) = pushed
    assert (token, name, repo) == ("secret", "run", "me/run")
    assert options == {"private": True, "exist_ok": True} and "adapter_model.safetensors" in files
    assert "secret" not in Path(given["output"], "report.json").read_text()


def test_the_help_has_the_defaults() -> None:
    """They are written twice: the command line loads no TRL to show its help."""
    options = read_options({"model": "m", "data": "d"}, FLAGS)
    full = read_options({"model": "m", "data": "d", "full": True}, FLAGS)
    shown = CliRunner().invoke(app, ["finetune", "--help"], env={"COLUMNS": "300"}).output
    for text in (
        f"Optimizer steps, {options.training.max_steps} if unset",
        f"Rows of one forward, {options.training.per_device_train_batch_size} if unset",
        f"Forwards of one step, {options.training.gradient_accumulation_steps} if unset",
        f"Rank of the adapters, {options.model.lora_r} if unset",
        f"Tokens of a row, {options.training.max_length} if unset",
        f"Folder to make; {options.run.output} if unset",
        f"{options.training.learning_rate:.0e}".replace("e-0", "e-")
        + f", or {full.training.learning_rate:.0e}".replace("e-0", "e-"),
    ):
        assert text in shown, text
