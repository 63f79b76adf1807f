"""A job in a process of its own: a CPU process keeps what it freed.

`python -m bench.memory.process bench.memory.child '{"provider": "eager", ...}'` calls that
module's `main` with the job and prints what it returns, as JSON.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from str_kernels.loss_memory import measure_peak

_ROOT = Path(__file__).parents[2]


class ChildFailed(RuntimeError):
    """A child did not end well; `why` is "failed: " and its last line, or the signal."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"measuring the memory of {what} {why}")
        self.why = why


def run_in_child(
    module: str, job: Mapping[str, Any], what: str, environment: Mapping[str, str] | None = None
) -> Any:
    """Return what `main(job)` of a module returns, in a process with as many threads as this one.

    Raises:
        ChildFailed: of `what`, a RuntimeError.
    """
    text = json.dumps({**job, "threads": torch.get_num_threads()})
    command = [sys.executable, "-m", "bench.memory.process", module, text]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=_ROOT, env=environment
    )
    if done.returncode < 0:
        raise ChildFailed(what, f"killed by {signal.Signals(-done.returncode).name}")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ChildFailed(what, f"failed: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def give_back() -> None:
    """Give the system back what was freed: it must count again."""
    ctypes.CDLL(None).malloc_trim(0)


def peak_of(step: Callable[[], object]) -> int:
    """Return the bytes that a step takes above what the process holds."""
    peak = measure_peak(step)
    if peak is None:
        raise RuntimeError("/proc/self/clear_refs is missing: memory is measured on Linux only")
    return peak


def _main(module: str, text: str) -> None:
    job = json.loads(text)
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    print(json.dumps(importlib.import_module(module).main(job)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
