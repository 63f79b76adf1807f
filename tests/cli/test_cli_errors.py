"""What every command does with mistakes: the user's in one line, our own with a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import str_kernels
from str_kernels import SafetyTokens
from str_kernels.cli import app
from str_kernels.cli.console import needs_integrations

HELD = ["eval", "run", "nowhere", "--output", "out"]
BUILT = ["tokens", "build", "nowhere", "--output", "out"]
CACHED = ["cache", "build", "nowhere", "--output", "out"]


def run(*arguments: object, **environment: str) -> Any:
    return CliRunner().invoke(app, [str(one) for one in arguments], env=environment)


def one_line(result: Any) -> str:
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.output, result.output
    return str(lines[0].removeprefix("error: "))


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        ([*HELD, "--harmful", "nofile"], "`--harmful` must be one of harmful_train,"),
        ([*HELD, "--harmless", "nofile"], "`--harmless` must be one of harmful_train,"),
        ([*HELD, "--text", "nofile"], "`--text`: "),
        ([*HELD, "--rule", "mine"], "`--rule` must be one of opening, gcg; got 'mine'"),
        ([*HELD, "--rule", "gcg", "--rule", "gcg"], "`--rule` must be distinct"),
        ([*HELD, "--judge-url", "ftp://x"], "`--judge-url` must be an http or https address"),
        (
            [*HELD, "--judge-url", "http://example.com"],
            "`--judge-url` must be on this machine unless --allow-remote-judge is set; got host",
        ),
        (
            [*HELD, "--judge-url", "http://localhost", "--judge-key-env", "NO_SUCH"],
            "`--judge-key-env` must name an environment variable",
        ),
        (
            [*BUILT, "--count", "3"],
            "`--count` must come with --from refusals or contrast or openings or random",
        ),
        (
            [*BUILT, "--from", "random", "--harmful", "x"],
            "`--harmful` must come with --from refusals or",
        ),
        ([*BUILT, "--from", "contrast", "--harmful", "nofile"], "`--harmful` must be one of"),
        (
            [*BUILT, "--from", "other"],
            "`--from` must be one of templates, refusals, contrast, openings, random",
        ),
        (["tokens", "show", "nofile"], "`file`: "),
        (["tokens", "compare", "nofile", "nofile"], "`first`: "),
        ([*CACHED, "--kind", "l1"], "`--kind` must be one of mse"),
        ([*CACHED, "--dtype", "int8"], "`--dtype` must be one of float32"),
        ([*CACHED, "--model-dtype", "int8"], "`--model-dtype` must be one of auto"),
        ([*CACHED, "--anchors", "nofile"], "`--anchors` must be one of harmful_train"),
        ([*CACHED, "--positions", "some"], "`--positions` must be"),
        ([*CACHED, "--chat-template-kwargs", "{"], "`--chat-template-kwargs` must be a JSON"),
        (["cache", "info", "nofile"], "`folder` must be a reference cache"),
        (["study", "--portion", "some"], "`--portion` must be of main,"),
    ],
)
def test_the_option_is_named_as_it_is_typed(
    arguments: list[str], start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert one_line(run(*arguments)).startswith(start)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["finetune", "nowhere", "rows.jsonl", "--anchors", ""], "`--anchors`"),
        (["finetune", "nowhere", "rows.jsonl", "--templates="], "`--templates`"),
        ([*HELD, "--adapter", ""], "`--adapter`"),
        ([*HELD, "--judge-url="], "`--judge-url`"),
        ([*BUILT, "--templates", ""], "`--templates`"),
        ([*CACHED, "--anchors", ""], "`--anchors`"),
        (["study", "--output", ""], "`--output`"),
        (["cache", "info", ""], "an argument"),
    ],
)
def test_an_empty_value_is_refused(
    arguments: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert one_line(run(*arguments)) == f"{named} must not be empty; got ''"
    assert not list(tmp_path.iterdir())


def test_an_empty_text_before_the_answer_is_a_text() -> None:
    said = one_line(run(*CACHED, "--answer-start", "", "--anchors", "nofile"))
    assert said.startswith("`--anchors` must be one of")


@pytest.mark.parametrize("options", [["--weight", "-1"], ["--seeds", "0"], ["--limit", "-1"]])
def test_the_study_refuses_before_any_arm(options: list[str], tmp_path: Path) -> None:
    result = run("study", "--output", tmp_path / "study", *options)
    assert result.exit_code == 2 and options[0] in result.output
    assert not list(tmp_path.iterdir())


def test_our_own_mistakes_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(error: Exception) -> Any:
        def load(*_: object) -> None:
            raise error

        monkeypatch.setattr(SafetyTokens, "load", load)
        return run("tokens", "show", "file")

    result = raises(TypeError("'NoneType' object is not subscriptable"))
    assert result.exit_code == 1 and isinstance(result.exception, TypeError)
    assert one_line(raises(TypeError("`ids` must be integers; got None"))).startswith("`ids` must")
    assert one_line(raises(OSError("disk full"))) == "disk full"


@pytest.mark.parametrize(
    ("missing", "extra"), [("transformers", "hf"), ("gguf", "hf"), ("trl", "trl")]
)
def test_a_missing_package_comes_with_its_remedy(missing: str, extra: str) -> None:
    with pytest.raises(ValueError, match=rf"{missing} installed; run: .*'\.\[{extra}\]'") as raised:
        with needs_integrations():
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
    # the index has no package of this name: a stranger's could be there tomorrow
    assert "pip install 'str-kernels" not in str(raised.value)


def test_our_own_missing_module_is_no_missing_package() -> None:
    with pytest.raises(ModuleNotFoundError), needs_integrations():
        raise ModuleNotFoundError("No module named 'str_kernels.x'", name="str_kernels.x")


def test_debug_shows_where_an_error_comes_from() -> None:
    for result in (
        run("--debug", "tokens", "show", "nofile"),
        run("tokens", "show", "nofile", STR_KERNELS_DEBUG="1"),
    ):
        assert result.exit_code == 2
        assert "Traceback" in result.stderr and "safety_tokens.py" in result.stderr
        assert "error: `file`: " in result.stderr


def test_version_help_and_completion() -> None:
    assert run("--version").output == f"str-kernels {str_kernels.__version__}\n"
    for arguments in ([], ["tokens"], ["tokens", "show"], ["eval", "run"], ["study"]):
        short, long = run(*arguments, "-h"), run(*arguments, "--help")
        assert short.exit_code == 0 and short.output == long.output
    assert "--show-completion" in run("--help").output


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "str_kernels", "--version"]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert (shown.stdout, shown.returncode) == (f"str-kernels {str_kernels.__version__}\n", 0)
