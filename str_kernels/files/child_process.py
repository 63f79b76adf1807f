"""Work in a process of its own, which keeps nothing that others have freed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ChildFailed(RuntimeError):
    """The process ended otherwise than well.

    Attributes:
        why: the last line that it wrote to stderr, or how it ended.
        signal: the name of the signal that killed it, or None.
    """

    def __init__(self, what: str, done: subprocess.CompletedProcess[str]) -> None:
        code = done.returncode
        self.signal = signal.Signals(-code).name if code < 0 else None
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
    """Run `python -m module job` and return what it prints last, which is JSON.

    Args:
        module: a name; run as a program it takes the job as JSON.
        job: what it does.
        what: is measured, for the message.
        folder: to run in; this one's without.
        environment: all of it; this one's without.

    Raises:
        ChildFailed: it ended otherwise than well.
    """
    command = [sys.executable, "-m", module, json.dumps(job)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder, env=environment
    )
    if done.returncode != 0:
        raise ChildFailed(what, done)
    return json.loads(done.stdout.strip().splitlines()[-1])
