"""A small synthetic cache, and builders of it in child processes that can be killed."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from str_kernels.reference_cache.reader import CachedReference
from str_kernels.reference_cache.writer import BuildReport, build_reference_cache

IDS = 5
# Of lengths 1 to 9, seven rows to a shard: the last shard is not full, batches are ragged.
ROWS = [[3 + (7 * row + 5 * at) % 97 for at in range(1 + row % 9)] + [row] for row in range(40)]
SHARDS = [f"shard-{number:05d}.safetensors" for number in range(6)]
PLAN: dict[str, Any] = {
    "model": "a" * 64,
    "safety_tokens": "b" * 64,
    "tokenizer": "c" * 64,
    "ids": IDS,
    "rows_per_shard": 7,
    "batch_tokens": 24,
}


def values_of(rows: list[list[int]]) -> Tensor:  # (sum of lengths, K)
    """Return values that depend on the whole row and on the batch it was in, as a model's do."""
    rounding = len(rows) * 1e-7
    made = [
        torch.tensor(row, dtype=torch.float32).cumsum(0)[:, None].sin() * torch.arange(1, IDS + 1)
        for row in rows
    ]
    return torch.cat(made) + rounding


def build(folder: Path, **options: Any) -> BuildReport:
    return build_reference_cache(folder, ROWS, values_of, **{**PLAN, **options})


def read_all(cached: CachedReference) -> dict[tuple[int, ...], Tensor]:
    return {tuple(row): cached.look_up({"input_ids": torch.tensor([row])}).values for row in ROWS}


def _slow(rows: list[list[int]]) -> Tensor:
    time.sleep(0.001)
    return values_of(rows)


def _build_in_child(folder: Path, started: Connection, most_bytes: int | None) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails, as on a full disk
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    started.send(None)
    try:
        build_reference_cache(folder, ROWS, _slow, **PLAN)
    except OSError as error:
        started.send(str(error))
        return
    started.send("done")
    time.sleep(60 if most_bytes is None else 0)  # to be killed: a child that ends was not


class Builder:
    """A builder in a child of a server that has torch already: milliseconds each."""

    def __init__(self, folder: Path, most_bytes: int | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["cache_faults"])
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the server looks nowhere else
        try:
            self.pipe, there = context.Pipe()
            self.process = context.Process(
                target=_build_in_child, args=(folder, there, most_bytes), daemon=True
            )
            self.process.start()
            there.close()
        finally:
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before
        self.pipe.recv()  # it begins now

    def outcome(self) -> str:
        """Wait for the build's end and return what it said."""
        said: str = self.pipe.recv()
        return said

    def kill(self) -> bool:
        """Kill it; say whether it was still building."""
        self.process.kill()
        self.process.join()
        try:
            self.pipe.recv()
        except EOFError:  # the other end is gone, and had said nothing
            return True
        return False


def content_of(folder: Path) -> dict[str, bytes]:
    """Return every file's bytes, without the times, which differ between runs."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name != "timings.json"
    }
