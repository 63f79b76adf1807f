"""What a kill, a signal, a full disk or a NaN leaves of a run of `finetune`."""

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
from typer.testing import CliRunner

from str_kernels.cli import app
from str_kernels.integrations.finetune import run_guard
from str_kernels.integrations.finetune.run_folder import RunFolder

pytest.importorskip("trl")  # the oldest releases of the matrix are tested without it
from finetune_cases import FLAGS, asked, data, given, losses, model, run

from str_kernels.integrations.finetune.run import NotFinite

__all__ = ["asked", "data", "given", "model"]  # fixtures


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


def test_a_loss_that_is_not_finite_stops_before_the_step(given: dict[str, Any]) -> None:
    with pytest.raises(NotFinite, match=r"is not finite at step \d, rows .*rows.jsonl, line \d"):
        run(given, lr=1e30, steps=6)
    kept = Path(given["output"] + ".diverged")
    (checkpoint, *_) = sorted(kept.glob("checkpoint-*"))
    assert not Path(given["output"] + ".unfinished").exists()  # the place is free
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
