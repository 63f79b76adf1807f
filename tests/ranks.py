"""Several processes that talk over gloo, on one machine, for the tests of what is spread over them.

They are forked from a server that has torch loaded already, so that four of them start in a second.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import pickle
import queue
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 120  # after which ranks are taken to hang
GLOO_SECONDS = 60
# Modules that any Python finds: the server knows nothing of the tests' folders before Python 3.13.
PRELOADED = ["torch.distributed.tensor", "torch.distributed.fsdp", "str_kernels", "pytest", "numpy"]


def run_ranks(
    ranks: int,
    function: Callable[..., Any],
    *arguments: Any,
    folder: Path,
    preload: tuple[str, ...] = (),
    gloo_seconds: float = GLOO_SECONDS,
) -> list[Any]:
    """Run `function(*arguments)` on each rank of a gloo group; return what each returned.

    Raises RuntimeError with the traceback of each rank that raised, and ends the others.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, *preload])
    results: Any = context.Queue()
    store = folder / "store"
    # as bytes: torch would share a tensor's memory between the processes, one file for each
    common = (ranks, store, gloo_seconds, function, pickle.dumps(arguments), results)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    processes = [
        context.Process(target=_run, args=(rank, *common), daemon=True) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    errors: dict[int, str] = {}
    deadline = time.monotonic() + SECONDS
    try:
        while len(found) + len(errors) < ranks:
            try:
                rank, value, error = pickle.loads(results.get(timeout=1))
            except queue.Empty:
                for rank, process in enumerate(processes):
                    if process.exitcode and rank not in errors and rank not in found:
                        errors[rank] = f"ended with exit code {process.exitcode}"
                        # the others are to notice by themselves
                        deadline = min(deadline, time.monotonic() + 3 * gloo_seconds)
                if time.monotonic() > deadline and errors:
                    break
                if time.monotonic() > deadline:
                    raise RuntimeError(f"ranks hang; done are {sorted(found)}") from None
                continue
            if error:
                errors[rank] = error
                deadline = min(deadline, time.monotonic() + 5)  # the others wait for it
            else:
                found[rank] = value
    finally:
        for process in processes:
            process.join(timeout=0 if errors else 10)
            if process.is_alive():
                process.terminate()
    if errors:
        raise RuntimeError("\n".join(f"rank {rank}: {errors[rank]}" for rank in sorted(errors)))
    return [found[rank] for rank in range(ranks)]


def _run(
    rank: int,
    ranks: int,
    store: Path,
    gloo_seconds: float,
    function: Callable[..., Any],
    arguments: bytes,
    results: Any,
) -> None:
    torch.set_num_threads(1)
    value, error = None, ""
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=gloo_seconds),
        )
        value = function(*pickle.loads(arguments))
        dist.barrier()
    except BaseException:
        error = traceback.format_exc()
    results.put(pickle.dumps((rank, value, error)))
    results.close()
    results.join_thread()
    if error:
        os._exit(1)  # and not wait for ranks that do not come
    dist.destroy_process_group()


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill with NaN what the package allocates, as conftest's fixture does in pytest's process."""
    spec = importlib.util.spec_from_file_location("of_tests", Path(__file__).parent / "conftest.py")
    if spec is None or spec.loader is None:
        raise ImportError("conftest.py")
    source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    before = [(owner, name, getattr(owner, name)) for owner, name in source.ALLOCATORS]
    for owner, name, allocate in before:
        setattr(owner, name, source._poisoned(allocate))
    try:
        yield
    finally:
        for owner, name, allocate in before:
            setattr(owner, name, allocate)


@contextlib.contextmanager
def counted_bytes() -> Iterator[dict[str, int]]:
    """Count the bytes that each collective of this process takes part in.

    `gathered`: of all ranks together, what each of them then holds; `reduced`: of one rank.
    """
    counted = {"gathered": 0, "reduced": 0, "calls": 0}
    gather, reduce = dist.all_gather, dist.all_reduce

    def all_gather(into: list[torch.Tensor], own: torch.Tensor, **options: Any) -> Any:
        counted["gathered"] += sum(part.numel() * part.itemsize for part in into)
        counted["calls"] += 1
        return gather(into, own, **options)

    def all_reduce(values: torch.Tensor, **options: Any) -> Any:
        counted["reduced"] += values.numel() * values.itemsize
        counted["calls"] += 1
        return reduce(values, **options)

    dist.all_gather, dist.all_reduce = all_gather, all_reduce
    try:
        yield counted
    finally:
        dist.all_gather, dist.all_reduce = gather, reduce
