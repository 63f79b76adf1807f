"""What TensorBoard and Weights & Biases are told, through transformers' own callbacks.

Neither is installed for the tests: stand-ins take their calls. Run by hand with tensorboard 2.21
and wandb 0.31 (offline), the same names and values were in their files.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from tiny_models import fresh_lora, tiny_model
from tiny_rows import Rows, arguments_of, log_of, trainer_of
from tiny_tokenizer import chat_tokenizer

from str_kernels import AnchorPrompts

TERMS = ("safety/ce", "safety/penalty", "safety/anchor_penalty", "safety/max_drift")


class Writer:
    """tensorboardX's SummaryWriter, as far as TensorBoardCallback calls it."""

    scalars: list[tuple[str, float, int]] = []  # noqa: RUF012 - the callback makes the writer

    def __init__(self, log_dir: str) -> None:
        self.scalars.clear()

    def add_text(self, tag: str, text: str, step: int = 0) -> None: ...
    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))

    def flush(self) -> None: ...
    def close(self) -> None: ...


class Run:
    """A run of wandb's, as far as WandbCallback looks at it."""

    def __init__(self) -> None:
        self.summary: dict[str, float] = {}

    def _label(self, **_: Any) -> None: ...


def stand_in(monkeypatch: Any, name: str, **content: Any) -> Any:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)  # transformers asks find_spec whether it is there
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def trained(seed: int, folder: Any, report_to: str) -> list[dict[str, float]]:
    """Train 4 steps, logging every second; return the entries of Trainer's own log."""
    arguments = arguments_of(
        folder, max_steps=4, per_device_train_batch_size=2, logging_steps=2, report_to=report_to,
        gradient_accumulation_steps=2, learning_rate=1e-2, use_cpu=True,
    )  # fmt: skip
    anchors = AnchorPrompts.from_prompts(chat_tokenizer(), ["help me"], per_step=1)
    model = fresh_lora(tiny_model("llama", seed))
    trainer = trainer_of(model, arguments, Rows(seed, 32), anchors=anchors)
    trainer.train()
    return log_of(trainer)


def test_tensorboard_draws_the_terms(seed: int, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # whoever has it
    stand_in(monkeypatch, "tensorboardX", SummaryWriter=Writer)
    log = trained(seed, tmp_path, "tensorboard")
    assert len(log) == 2 and log[1]["safety/penalty"] > 0.0 < log[1]["safety/anchor_penalty"]
    for term in TERMS:
        drawn = [(value, step) for tag, value, step in Writer.scalars if tag == f"train/{term}"]
        assert drawn == [(log[0][term], 2), (log[1][term], 4)], term


def test_wandb_gets_the_terms(seed: int, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.delenv("WANDB_DISABLED", raising=False)
    calls: list[dict[str, float]] = []
    module = stand_in(monkeypatch, "wandb", run=None, config={}, log=calls.append)
    module.config = type("Config", (dict,), {"update": lambda self, given, **_: None})()
    module.init = lambda **_: setattr(module, "run", Run())
    for name in ("wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util"):
        stand_in(monkeypatch, name, ConfigError=RuntimeError)
    log = trained(seed, tmp_path, "wandb")
    told = [call for call in calls if "train/loss" in call]
    assert [call["train/global_step"] for call in told] == [2, 4]
    for call, entry in zip(told, log, strict=True):
        for term in ("loss", *TERMS):
            assert call[f"train/{term}"] == entry[term], term
