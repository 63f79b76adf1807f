"""Run a job in a fresh process, whose memory no earlier work has touched."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ChildFailed(RuntimeError):
    """The child process failed.

    Attributes:
        why: the last line that it wrote to stderr, or its exit code.
        signal: the name of the signal that killed it, or None.
    """

    def __init__(self, what: str, done: subprocess.CompletedProcess[str]) -> None:
        code = done.returncode
        self.signal = {one.value: one.name for one in signal.Signals}.get(-code)
        self.why = (done.stderr.strip().splitlines() or [f"exit code {code}"])[-1]
        super().__init__(f"measuring {what} failed: {self.why}")


def in_child(
    module: str,
    job: Mapping[str, Any],
    what: str,
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """Run `python -m module job` and return the JSON value on the last line that it prints.

    Args:
        module: name of a module that can be run as a program and takes the job as JSON.
        job: the job's description.
        what: what is measured, for the error message.
        folder: the working directory; this process's when None.
        environment: all environment variables; this process's when None.

    Raises:
        ChildFailed: the process ended with an error or by a signal.
    """
    command = [sys.executable, "-m", module, json.dumps(job)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder, env=environment
    )
    if done.returncode != 0:
        raise ChildFailed(what, done)
    return json.loads(done.stdout.strip().splitlines()[-1])
