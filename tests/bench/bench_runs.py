"""Running `python -m bench`, in this process and in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from bench.__main__ import app

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n"


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def refused(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 2, done.output
    return done.output


def run_apart(*command: object, code: int = 0) -> str:
    """Run Python in a process whose kernels are not interpreted; return what it printed."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout
