"""`str-kernels plan`: its table, its JSON, the line to copy, and bad input in one line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny_models import CONFIGS
from typer.testing import CliRunner

from str_kernels.cli import app
from str_kernels.integrations.finetune.options import read_options


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A config and nothing else, as a model's folder without its weights."""
    CONFIGS["llama"]().save_pretrained(tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]
    return tmp_path / "model"


def read(line: str) -> Any:
    """Read a printed line as the command that it names does."""
    program, name, *words = shlex.split(line)
    assert (program, name) == ("str-kernels", "finetune")
    command: Any = typer.main.get_command(app)
    context = command.commands[name].make_context(name, words)
    given = {key: str(v) if isinstance(v, Path) else v for key, v in context.params.items() if v}
    return read_options(given, context.args)


def test_json_has_every_number_and_a_line_that_runs(folder: Path) -> None:
    done = run(folder, "--tokens", 16, "--batch", 2, "--lora-rank", 4, "--memory", 0.01, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert set(found) == {
        "schema_version", "model", "options", "dtype", "weights", "reference_weights",
        "gradients", "optimizer", "activations", "positions", "memory", "ways", "command",
    }  # fmt: skip
    assert (found["schema_version"], found["model"]) == (1, str(folder))
    assert found["options"]["tokens"] == 16 and found["options"]["lora_rank"] == 4
    assert list(found["ways"]) == ["own", "by_hand", "chunked", "ours"]
    for way in found["ways"].values():
        assert set(way) == {"loss", "reference", "step", "peak", "longest"}
        assert way["peak"] >= found["weights"] + found["optimizer"] + way["loss"]
    options = read(found["command"])
    assert options.model.model_name_or_path == str(folder)
    assert options.training.per_device_train_batch_size == 2 and options.model.lora_r == 4
    assert options.training.max_length == min(16, found["ways"]["ours"]["longest"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], {"max_length": 1024, "per_device_train_batch_size": 8, "safety_positions": "none"}),
        (["--reference", "live"], {"safety_positions": "response", "safety_cache": None}),
        (["--reference", "cached"], {"safety_positions": "response", "safety_cache": "CACHE"}),
        (["--accumulation", 3, "--full"], {"gradient_accumulation_steps": 3, "use_peft": False}),
        (["--dtype", "bfloat16"], {"dtype": "bfloat16", "lora_r": 8, "use_peft": True}),
        (["--attention", "eager"], {"attn_implementation": "eager"}),
        (["--checkpointing"], {"gradient_checkpointing": True}),
    ],
)
def test_the_line_says_what_was_planned(
    folder: Path, given: list[str], expected: dict[str, Any]
) -> None:
    done = run(folder, *given)
    assert done.exit_code == 0, done.output
    (line,) = (line for line in done.output.splitlines() if line.startswith("str-kernels finetune"))
    options = read(line)
    found = vars(options.training) | vars(options.model)
    assert {name: found[name] for name in expected} == expected
    assert ("weights of the reference" in done.output) is ("--full" in given)


def test_where_nothing_fits_there_is_no_line(folder: Path) -> None:
    done = run(folder, "--memory", 1e-6)
    assert done.exit_code == 0 and "str-kernels finetune" not in done.output
    assert "two tokens" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/folder"], "`model` must be 'builtin', a folder"),
        (["{folder}", "--dtype", "int8"], "dtype` must be one of auto"),
        (["{folder}", "--reference", "both"], "reference` must be one of none"),
        (["{folder}", "--memory", "-1"], "`--memory` must be > 0, in GiB; got -1"),
        (["{folder}", "--memory", "nan"], "`--memory` must be > 0, in GiB; got nan"),
        (["{folder}", "--memory", "inf"], "`--memory` must be > 0, in GiB; got inf"),
    ],
)
def test_bad_input_is_one_line(folder: Path, arguments: list[str], message: str) -> None:
    done = run(*(word.format(folder=folder) for word in arguments))
    assert done.exit_code == 2 and message in done.stderr, done.output
    assert len(done.stderr.strip().splitlines()) == 1 and done.stdout == ""


def test_a_line_with_another_option_would_be_refused() -> None:
    with pytest.raises(ValueError, match="no-such-option"):  # else `read` would prove nothing
        read("str-kernels finetune builtin data.jsonl --no-such-option")
