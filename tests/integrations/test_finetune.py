"""`finetune` as a run: TRL's options through it, what it writes, and what a kill leaves behind."""

from __future__ import annotations

import errno
import functools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tokenizer import save_tiny_model
from typer.testing import CliRunner

from str_kernels.cli import app
from str_kernels.integrations import run_guard
from str_kernels.integrations.run_folder import RunFolder

pytest.importorskip("trl")  # the oldest releases of the matrix are tested without it
from str_kernels.integrations.finetune import NotFinite, finetune, prepare
from str_kernels.integrations.finetune_options import read_options

WORDS = ("what is 1", "what is 2", "good day", "thanks", "bye", "hello", "3 + 4", "5 - 1")
FLAGS = ("--use_cpu",)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model", 3)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{word} =", "completion": f" {word} bye"} for word in WORDS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    path = tmp_path / "templates.txt"
    path.write_text("sorry , but I can not help with that .\n")
    return path


@pytest.fixture
def given(model: Path, data: Path, asked: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(model), "data": str(data), "output": str(tmp_path / "run"),
        "templates": str(asked), "steps": 4, "batch_size": 2, "max_length": 32, "lora_rank": 2,
        "lr": 1e-2,
    }  # fmt: skip


def run(given: dict[str, Any], *flags: str, **more: Any) -> dict[str, Any]:
    return finetune(read_options({**given, **more}, [*FLAGS, *flags])).report


def losses(report: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in report["log"]]


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


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lr": 1e-3}, "`learning_rate` must be as the run began, 0.01, to go on with it"),
        ({"weight": 5.0}, "`safety_weight` must be as the run began, None"),
        ({"lora_rank": 4}, "`lora_alpha` must be as the run began, 4"),
        ({"steps": 20}, "`max_steps` must be as the run began, 4"),
    ],
)
def test_a_run_goes_on_with_the_options_it_began_with(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], message: str
) -> None:
    with monkeypatch.context() as patch, pytest.raises(run_guard.Stopped):
        stop_at(patch, 2)
        run(given)
    with pytest.raises(ValueError, match=message):
        run(given, resume=True, **more)
    other = Path(given["data"]).with_name("other.jsonl")
    other.write_text(Path(given["data"]).read_text().replace("bye", "hello"))
    with pytest.raises(ValueError, match="`data` must be as the run began"):
        run(given, resume=True, data=str(other))
    assert len(run(given, "--logging_first_step", resume=True)["log"]) == 4


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
    assert ">>>what is 1 bye <end><<<" in plan["first_row"] and plan["memory_gib"] is not None
    assert sorted(tmp_path.rglob("*")) == before
    shown = CliRunner().invoke(app, ["finetune", *arguments, *output])
    assert shown.exit_code == 0 and "Plan, nothing was trained" in shown.output


def test_a_loss_that_is_not_finite_stops_before_the_step(given: dict[str, Any]) -> None:
    with pytest.raises(NotFinite, match=r"is not finite at step \d, rows .*rows.jsonl, line \d"):
        run(given, lr=1e30, steps=6)
    unfinished = Path(given["output"] + ".unfinished")
    (checkpoint, *_) = sorted(unfinished.glob("checkpoint-*"))
    assert (checkpoint / "manifest.json").exists() and not Path(given["output"]).exists()


def test_a_full_disk_leaves_the_last_checkpoint(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = losses(run(given, "--save_steps", "1"))
    shutil.rmtree(given["output"])
    real, calls = torch.save, []

    def full(what: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(file)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        real(what, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        run(given, "--save_steps", "1")
    monkeypatch.setattr(torch, "save", real)
    last = RunFolder(Path(given["output"])).last_checkpoint()
    assert last is not None
    assert losses(run(given, "--save_steps", "1", resume=True)) == whole


def test_a_changed_checkpoint_is_not_gone_on_with(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 2)
    with pytest.raises(run_guard.Stopped):
        run(given)
    folder = RunFolder(Path(given["output"]))
    checkpoint = folder.last_checkpoint()
    assert checkpoint is not None and not (checkpoint / "training_args.bin").exists()
    with pytest.raises(ValueError, match=r"`output` must not have an unfinished run"):
        run(given)
    file = checkpoint / "optimizer.pt"
    kept = file.read_bytes()
    file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"optimizer.pt is missing or was changed"):
        run(given, resume=True)
    file.write_bytes(kept)
    (checkpoint / "more.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"more.bin was added"):
        run(given, resume=True)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    real = run_guard.RunGuard.on_step_end

    def stopping(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            os.kill(os.getpid(), number)
        real(self, args, state, control, **kwargs)

    monkeypatch.setattr(run_guard.RunGuard, "on_step_end", stopping)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_to_go_on_with(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    whole = losses(run(given))
    shutil.rmtree(given["output"])
    names = ("output", "templates", "steps", "batch_size", "max_length", "lora_rank", "lr")
    flags = [x for n in names for x in (f"--{n.replace('_', '-')}", str(given[n]))]
    arguments = ["finetune", given["model"], given["data"], *flags, *FLAGS]
    with monkeypatch.context() as patch:
        stop_at(patch, 2, number)
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 128 + number, result.output
    assert "with --resume goes on" in result.output
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    result = CliRunner().invoke(app, [*arguments, "--resume", "--json"])
    assert result.exit_code == 0, result.output
    assert losses(json.loads(result.stdout)) == whole


def killed_at(write: int, folder: str, call: Callable[[], Any]) -> int:
    """Run in a child that is killed when it opens its `write`-th file of a folder for writing."""

    def child() -> None:
        count = 0

        def hook(event: str, arguments: Any) -> None:
            nonlocal count
            if event not in ("open", "os.rename", "os.remove", "os.rmdir"):
                return
            path, flags = str(arguments[0]), arguments[2] if event == "open" else os.O_WRONLY
            if folder in path and flags & (os.O_WRONLY | os.O_RDWR):
                count += 1
                if count == write:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        call()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return process.exitcode or 0


def test_a_kill_at_any_write_loses_nothing(given: dict[str, Any], tmp_path: Path) -> None:
    torch.set_num_threads(1)  # a child of fork has no other threads
    whole = losses(run(given, "--save_steps", "1"))
    points = int(os.environ.get("STR_FAULTS", "10"))
    draw, killed = random.Random(), 0
    for point in range(points):
        output = str(tmp_path / f"run-{point}")
        write = draw.randint(1, 90)
        mine = {**given, "output": output}
        code = killed_at(write, output, functools.partial(run, mine, "--save_steps", "1"))
        killed += code == -signal.SIGKILL
        if not Path(output, "report.json").exists():
            resume = Path(output + ".unfinished").is_dir()
            found = losses(run(mine, "--save_steps", "1", resume=resume))
            assert found == whole, f"killed at write {write}"
        else:
            report = json.loads(Path(output, "report.json").read_text())
            assert losses(report) == whole, f"killed at write {write}"
        shutil.rmtree(output)
    print(f"{points} injected, {killed} killed, {points} survived, 0 lost")
    assert killed >= points // 2


@pytest.mark.slow
def test_torchrun_trains_one_run(given: dict[str, Any]) -> None:
    alone = losses(run(given, batch_size=4))
    output = given["output"] + "-ranks"
    names = ("templates", "steps", "batch_size", "max_length", "lora_rank", "lr")
    flags = [x for n in names for x in (f"--{n.replace('_', '-')}", str(given[n]))]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
            *("-m", "str_kernels", "finetune", given["model"], given["data"], "--output", output),
            *(*flags, *FLAGS, "--json"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(Path(output, "report.json").read_text())
    assert losses(report) == pytest.approx(alone, rel=1e-5)
    assert done.stdout.count('"folder"') == 1


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
