"""What a model's folder cannot do, and what a command tells nobody: SECURITY.md names these."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import save_tiny_model

from str_kernels.integrations.loading import load_model
from str_kernels.integrations.loading.models import load_tokenizer

# Writes every address that is looked up or connected to, and refuses it.
WATCH = """
import os, socket

def refuse(*address, **_):
    with open(os.environ["ASKED"], "a") as file:
        file.write(f"{address[0]}\\n")
    raise OSError("this machine is alone")

socket.getaddrinfo = socket.create_connection = refuse
"""


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(save_tiny_model(tmp_path / "model", 3))


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_code_in_a_models_folder_is_not_run(model: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (model / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: ...\n")
    edit_json(model / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    with pytest.raises(ValueError, match="`model` must be"):
        load_model(str(model))
    edit_json(model / "config.json", model_type="llama")
    edit_json(
        model / "tokenizer_config.json",
        tokenizer_class="Own",
        auto_map={"AutoTokenizer": ["own.Own", "own.Own"]},
    )
    try:
        load_tokenizer(str(model))
    except ValueError as error:  # a release may refuse it, or read tokenizer.json alone
        assert "`model` must be" in str(error)
    assert not ran.exists()


def test_weights_in_a_pickle_are_not_read(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    with (model / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Canary(tmp_path / "unpickled"), file)
    with pytest.raises(ValueError, match="`model` must be"):
        load_model(str(model))
    assert not (tmp_path / "unpickled").exists()
    with (model / "pytorch_model.bin").open("rb") as file:  # the bird sings where one listens
        pickle.load(file)
    assert (tmp_path / "unpickled").exists()


@pytest.mark.slow
def test_a_fine_tuning_from_files_asks_nobody(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")  # the oldest releases of the matrix are tested without it
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCH)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "hello", "completion": "good day"}\n' * 4)
    # what would keep Hugging Face's libraries quiet by itself
    quiet = {"CI", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"}
    quiet |= {"DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_DATASETS_OFFLINE"}
    environment = {name: value for name, value in os.environ.items() if name not in quiet}
    environment |= {"ASKED": str(tmp_path / "asked"), "PYTHONPATH": str(tmp_path / "watch")}
    command = ["-m", "str_kernels", "finetune", model, rows, "--output", tmp_path / "run"]
    options = ["--steps", "1", "--batch-size", "2", "--max-length", "32", "--lora-rank", "2"]
    done = subprocess.run(
        [sys.executable, *map(str, command), *options],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "asked").exists(), (tmp_path / "asked").read_text()
