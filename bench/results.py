"""Result files, and the origin that is recorded in each row."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from str_kernels.files.atomic import replacing

from .steps.providers import version_of

ROOT = Path(__file__).parents[1]
"""Where `python -m bench` is run."""

FOLDER = ROOT / "bench" / "results"
FIGURES = ROOT / "docs" / "img"  # the figures of the docs
Row = dict[str, Any]


def device_name(device: str) -> str:
    """Return the GPU's name, or the CPU's with the number of threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{_cpu_model()}, {threads} thread{'s' if threads > 1 else ''}"


def origin(device: str, protocol: str) -> Row:
    """Return the columns that all rows of a run share: when, where, with what, and how."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "protocol": protocol,
    }


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a CSV file, or create it; the file is complete at any moment.

    New columns are added on the right, and rows without them are empty there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    every = [*(read_rows(path) if path.exists() else []), *rows]
    columns = dict.fromkeys(name for row in every for name in row)
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(every)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read all rows of a CSV file, as text."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def newest(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return the rows of the latest run."""
    last = max(row["date"] for row in rows)
    return [dict(row) for row in rows if row["date"] == last]


def _commit() -> str:
    """Return the short commit, with a + if the tree differs from it."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        # otherwise status would write the index, which another git may have locked
        quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        folder = Path(__file__).parent
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=folder, env=quiet
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else "unknown"
    return f"{platform.machine()} CPU" if name.lower() == "unknown" else name
