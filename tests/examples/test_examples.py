"""Each script of examples/ is run as it stands, on a tiny model, and does what it says."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_tokenizer import save_tiny_model
from typer.testing import CliRunner

from str_kernels.cli import app

pytest.importorskip("trl")  # the oldest releases of the matrix are tested without it

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

pytestmark = [
    # TRL calls checkpointing by names that newer releases of transformers have others for
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
    # Trainer's default is for GPUs, and so are the scripts
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder from which the default model's name and the examples' paths lead on."""
    # 128 wide, since bitsandbytes packs no less
    save_tiny_model(tmp_path / DEFAULT_MODEL, 7, hidden_size=128, intermediate_size=256)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, script: str, *flags: str) -> None:
    """Run a script as `python examples/SCRIPT FLAGS` does."""
    monkeypatch.setattr(sys, "argv", [f"examples/{script}", *flags])
    runpy.run_path(f"examples/{script}", run_name="__main__")


def numbers(printed: str, name: str) -> list[float]:
    """Return what was printed behind a name, in order."""
    return [float(x) for x in re.findall(rf"{name}\W+([\d.]+(?:e-?\d+)?)", printed)]


def assert_adapter(folder: Path) -> None:
    """Look for an adapter that has moved."""
    from safetensors.torch import load_file

    weights = load_file(folder / "adapter_model.safetensors")
    moved = [weight for name, weight in weights.items() if "lora_B" in name]
    assert moved and all(torch.isfinite(weight).all() for weight in moved)
    assert any(weight.abs().max() > 0 for weight in moved)
    assert (folder / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("script", "flags", "loss", "penalty"),
    [
        ("quickstart.py", (), "loss", "safety/anchor_penalty"),
        ("plain_loop.py", (), "loss", "penalty at anchors"),
        ("loss_only.py", (), "ce", "penalty"),
        ("trainer.py", (), "loss", "safety/anchor_penalty"),
        ("sft.py", ("--config", "examples/sft.yaml"), "loss", "safety/anchor_penalty"),
        ("long_context.py", ("--steps", "2"), "loss", "safety/anchor_penalty"),
        ("dpo.py", (), "loss", "safety/penalty"),
    ],
)
def test_a_script_trains_with_a_penalty_and_saves(
    script: str,
    flags: tuple[str, ...],
    loss: str,
    penalty: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(monkeypatch, script, *flags)
    printed = capsys.readouterr().out
    losses, penalties = (numbers(printed, rf"\b{name}'?") for name in (loss, penalty))
    assert len(losses) == len(penalties) == 2, printed
    assert losses[-1] < losses[0]
    assert penalties[-1] > 0  # in each the model has moved, and is held
    assert_adapter(here / "run")


def test_qlora(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is of the extra 'dev', and for Linux")
    run(monkeypatch, "qlora.py")
    printed = capsys.readouterr().out
    losses = numbers(printed, r"\bloss'?")
    assert losses[-1] < losses[0] and numbers(printed, "safety/anchor_penalty'?")[-1] > 0
    assert_adapter(here / "run")


@pytest.mark.slow  # five processes, each with torch and transformers of its own
@pytest.mark.parametrize("more", [(), ("--shard",)], ids=["ddp", "fsdp2"])
def test_torchrun_has_the_losses_of_one_rank(more: tuple[str, ...], here: Path) -> None:
    """Two ranks of 4 rows take the steps of one rank of 8, whose labels are the same."""

    def losses(ranks: int, rows: int) -> list[float]:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(ranks), "examples/torchrun.py",
            "--batch-size", str(rows), "--steps", "4", *more,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return numbers(done.stdout, "loss")

    one, two = losses(1, 8), losses(2, 4)
    assert len(one) == 4 and one[-1] < one[0]
    assert two == pytest.approx(one, rel=1e-4)  # five decimals are printed


def test_the_page_names_each_file_and_evaluates(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.rglob("*"):
        if path.suffix in (".py", ".yaml", ".ipynb", ".jsonl"):
            assert path.name in page, path.name

    run(monkeypatch, "plain_loop.py")
    commands = re.findall(r"^str-kernels (eval .*)$", page, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        result = CliRunner().invoke(app, shlex.split(command))
        assert result.exit_code == 0, result.output
    found = json.loads((here / "after" / "eval.json").read_text(encoding="utf-8"))
    assert found["counts"]["opening"]["harmful"]["total"] == 8
    assert (here / "compared" / "report.md").is_file()
