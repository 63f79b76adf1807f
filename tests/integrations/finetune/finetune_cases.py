"""A tiny model, a few rows, and a run of `finetune` on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import save_tiny_model

pytest.importorskip("trl")  # the oldest releases of the matrix are tested without it
from str_kernels.integrations.finetune.options import read_options
from str_kernels.integrations.finetune.run import finetune

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
