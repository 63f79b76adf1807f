"""Each option of attach() is a field of TRL's config, a flag with help and a key of YAML.

Axolotl's and ms-swift's settings are held to the same list in their own tests.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from str_kernels.attach_options import SETTINGS, SafetySettings, Setting
from str_kernels.cli import app

pytest.importorskip("trl")  # the oldest releases of the matrix are tested without it
from finetune_cases import FLAGS
from trl import ModelConfig, SFTConfig, TrlParser

from str_kernels.integrations.finetune.options import ALIASES, RunOptions, read_options
from str_kernels.integrations.trainers.trl_sft import SafetySFTConfig

READ = {"model": "m", "data": "d"}
ROWS = {"safety_positions": "response"}  # for what has no effect at anchors alone
# A value that is not the default, and what else it needs.
OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "safety_weight": (0.5, {}),
    "safety_kind": ("huber", {}),
    "safety_temperature": (2.0, {}),
    "safety_delta": (3.0, {}),
    "safety_tokens": ("file", {}),
    "safety_templates": ("file", {}),
    "safety_cache": ("folder", {}),
    "safety_positions": ("4", {}),
    "safety_ref_every": (2, ROWS),
    "safety_ref_tokens": (9, ROWS),
    "safety_path": ("logits", {}),
    "safety_chunk_bytes": (4096, {}),
    "safety_backend": ("torch", {}),
    "safety_anchors": ("prompts", {}),
    "safety_anchors_per_step": (3, {}),
    "safety_harmless_anchors_per_step": (1, {}),
    "safety_anchor_penalty_weight": (0.25, {}),
    "safety_chat_template_kwargs": ('{"enable_thinking": false}', {}),
    "safety_answer_start": ("</think>", {}),
    "safety_anchor_weight": (1.0, {}),
}
TAKEN = [one for one in SETTINGS if not one.hidden]


def named(one: Setting) -> str:
    return one.name


def test_there_is_a_value_for_every_option() -> None:
    assert [one.field for one in SETTINGS if one.name not in OTHERS] == []
    assert {one.field for one in SETTINGS} == {one.name for one in fields(SafetySettings)}
    assert all(one.help and OTHERS[one.name][0] != one.default for one in SETTINGS)


@pytest.mark.parametrize("one", SETTINGS, ids=named)
def test_trl_s_config_has_it(one: Setting) -> None:
    (found,) = (field for field in fields(SafetySFTConfig) if field.name == one.name)
    assert found.default == one.default and found.default_factory is MISSING
    assert found.metadata["help"].startswith(one.help)
    shown = " ".join(TrlParser((SafetySFTConfig,)).format_help().split())
    assert f"--{one.name}" in shown and one.help in shown


@pytest.mark.parametrize("one", SETTINGS, ids=named)
def test_the_command_has_it(one: Setting) -> None:
    command: Any = typer.main.get_command(app)
    (found,) = (x for x in command.commands["finetune"].params if x.name == one.flag)
    flag = f"--{one.flag.replace('_', '-')}"
    assert found.opts == [flag] and found.help == one.help and found.hidden == one.hidden
    assert found.default is None  # left to the config, whose default is the option's own
    assert found.show_default == (False if one.default is None else str(one.default))
    shown = CliRunner().invoke(app, ["finetune", "--help"], env={"COLUMNS": "200"}).output
    assert (f" {flag} " in shown) != one.hidden


def test_the_defaults_of_a_run_are_those_of_the_options() -> None:
    training = read_options(READ, FLAGS).training
    assert {one.name: getattr(training, one.name) for one in SETTINGS} == {
        one.name: one.default for one in SETTINGS
    }
    assert vars(training.settings) == vars(SafetySettings())


@pytest.mark.parametrize("one", TAKEN, ids=named)
def test_it_arrives_from_a_flag_and_from_yaml(one: Setting, tmp_path: Path) -> None:
    value, more = OTHERS[one.name]
    if value == "file":
        value = str(tmp_path / "file")
        Path(value).touch()
    wanted = getattr(SafetySettings.of({one.name: value, **more}), one.field)
    flags = [word for name, x in more.items() for word in (f"--{name}", str(x))]
    for name in (one.name, one.flag, one.flag.replace("_", "-")):
        typed = read_options(READ, [*FLAGS, *flags, f"--{name}", str(value)])
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump({**READ, **more, name: value}))
        for options in (typed, read_options({}, FLAGS, config=file)):
            assert getattr(options.training, one.name) == value
            assert getattr(options.training.settings, one.field) == wanted
            assert one.name in options.chosen
    given = read_options({**READ, **more, one.flag: value}, FLAGS)  # as the command does
    assert getattr(given.training.settings, one.field) == wanted


def test_a_short_name_hides_no_option_of_trl() -> None:
    known = {x.name for kind in (RunOptions, SFTConfig, ModelConfig) for x in fields(kind)}
    assert {one.flag for one in SETTINGS if one.flag != one.name} <= set(ALIASES) - known


def test_what_is_wrong_is_said_before_anything_is_loaded() -> None:
    for flags, message in (
        (["--path", "head"], "`safety_path` must be one of linear, logits; got 'head'"),
        (["--ref-every", "2"], "`safety_ref_every` and `safety_ref_tokens` must be left out"),
        (["--anchor-weight", "1"], "Set `safety_anchor_penalty_weight`"),
    ):
        with pytest.raises(ValueError, match=message):
            read_options(READ, [*FLAGS, *flags])
    result = CliRunner().invoke(app, ["finetune", "m", "d", "--use_cpu", "--path", "head"])
    assert result.exit_code == 2 and "`--path` must be one of linear, logits" in result.output
