"""A lock is one process's at a time, goes with it, and leaves no file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from str_kernels.files.locks import holder, locked

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("flock", [True, False], ids=["flock", "file"])
def test_a_lock_is_held_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flock: bool) -> None:
    if not flock:
        monkeypatch.setitem(sys.modules, "fcntl", None)
    path = tmp_path / "lock"
    with locked(path) as mine:
        assert mine and path.exists()
        with locked(path) as twice:
            assert not twice
        assert path.exists(), "who did not get it removed it"
    assert not path.exists()
    with pytest.raises(KeyError), locked(path):
        raise KeyError
    with locked(path) as again:
        assert again
    assert ("delete it" in holder(path)) is not flock


def test_a_killed_process_lets_go_and_who_waits_gets_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = f"""
from pathlib import Path
from str_kernels.files.locks import locked
with locked(Path({str(path)!r})) as mine:
    print(mine, flush=True)
    input()
"""
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as other:
        assert other.stdout is not None and other.stdout.readline() == "True\n"
        with locked(path) as mine:
            assert not mine
        os.kill(other.pid, signal.SIGKILL)
        with locked(path, wait=True) as mine:
            assert mine


def test_a_file_that_was_removed_locks_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who had the lock removes its file after it was opened here, and another makes a new one."""
    path = tmp_path / "lock"
    real, opened = os.open, []

    def late(name: Path, *flags: int) -> int:
        opened.append(real(name, *flags))
        if len(opened) == 1:
            path.rename(tmp_path / "removed")
            os.close(real(name, *flags))
        return opened[-1]

    monkeypatch.setattr(os, "open", late)
    with locked(path) as mine:
        assert mine and len(opened) == 2
        monkeypatch.undo()
        with locked(path) as twice:
            assert not twice
