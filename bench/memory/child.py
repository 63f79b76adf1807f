"""Measure one provider's peak memory in a new process, since a CPU process keeps freed memory.

`python -m bench.memory.child '{"provider": "eager", "tokens": 64, ...}'` is the child.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import torch

from str_kernels.files.child_process import in_child
from str_kernels.loss_memory import measure_peak

from ..inputs import draw_inputs
from ..results import ROOT
from ..steps.heads import HeadShape
from ..steps.providers import ALL_OPTIONS, bare_products, providers

FLOOR = "bare products"


def peak_in_child(
    provider: str,
    shape: HeadShape,
    tokens: int,
    ids: int,
    dtype: torch.dtype = torch.bfloat16,
    train_head: bool = False,
) -> int:
    """Return the bytes that a forward and backward take above the inputs, on the CPU.

    Args:
        provider: a name of `providers()`, or "bare products".
        shape: V, D, scale and cap.
        tokens: N.
        ids: K.
        dtype: of hidden states and head.
        train_head: whether the head gets a gradient too.

    Raises:
        RuntimeError: the child failed; the message has its last line.
    """
    job = {
        "provider": provider,
        "shape": shape,
        "tokens": tokens,
        "ids": ids,
        "dtype": str(dtype).removeprefix("torch."),
        "train_head": train_head,
        "threads": torch.get_num_threads(),
    }
    return int(in_child("bench.memory.child", job, f"the memory of {provider}", folder=ROOT))


def _child(job: dict[str, Any]) -> int:
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    name = job["provider"]
    shape = HeadShape(*job["shape"])
    found = {p.name: p for p in providers(all_options=True)}
    provider = found.get(name)
    if provider is None and name != FLOOR:
        raise ValueError(f"`provider` must be one of {', '.join([*found, FLOOR])}; got {name!r}")

    inputs = draw_inputs(
        shape,
        job["tokens"],
        job["ids"],
        getattr(torch, job["dtype"]),
        train_head=job["train_head"],
        log_probs=name.endswith(ALL_OPTIONS),
    )

    def step(rows: int) -> None:
        part = inputs if rows == job["tokens"] else inputs.first(rows)
        if provider is None:
            bare_products(part)
        else:
            torch.autograd.grad(provider.loss(part), part.leaves())

    # Libraries allocate their buffers at first use, and a compiler its memory, for this very shape.
    whole = provider is not None and provider.warm_up_whole
    step(job["tokens"] if whole else 1)
    ctypes.CDLL(None).malloc_trim(0)  # else memory that the warm-up freed would not count again
    peak = measure_peak(lambda: step(job["tokens"]))
    if peak is None:
        raise RuntimeError("/proc/self/clear_refs is missing: memory is measured on Linux only")
    return peak


if __name__ == "__main__":
    print(_child(json.loads(sys.argv[1])))
