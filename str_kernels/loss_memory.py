"""Measure the peak memory of a hand-written loss and of ours, each in a fresh process.

The child is `python -m str_kernels.loss_memory '{"provider": "ours", "tokens": 2048}'`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .files import in_child
from .op import safety_linear_cross_entropy

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
# The hand-written loss peaks near 9 GB at 8,192 tokens and a vocabulary of 49,152.
_FREE_BYTES_FOR_LONG = 10 * 10**9


class LossMemory(NamedTuple):
    """Peak memory of a forward and backward pass, without its inputs, bytes."""

    tokens: int
    by_hand: int
    ours: int
    measured: bool  # False: computed from a measurement at fewer tokens


def loss_by_hand(
    hidden: Tensor,  # (N, D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    safety_ids: Tensor,  # (K,)
    ref: Tensor,  # (N, K)
    weight: float = 0.1,
) -> Tensor:  # ()
    """Compute the loss in the obvious way: all logits at once, in float32 as transformers does."""
    logits = torch.nn.functional.linear(hidden, linear_weight).float()
    ce = torch.nn.functional.cross_entropy(logits, target)
    return ce + weight * (logits[:, safety_ids] - ref).square().mean()


def our_loss(
    hidden: Tensor, linear_weight: Tensor, target: Tensor, safety_ids: Tensor, ref: Tensor
) -> Tensor:
    """Compute the same loss with `safety_linear_cross_entropy`."""
    return safety_linear_cross_entropy(hidden, linear_weight, target, safety_ids, ref).loss


PROVIDERS = {"by_hand": loss_by_hand, "ours": our_loss}


def random_inputs(
    tokens: int, width: int, vocab: int, ids: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draw hidden (a leaf with gradient), a frozen head, targets, safety ids and references."""
    hidden = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
    head = (torch.randn(vocab, width, device=device) * width**-0.5).to(dtype)
    target = torch.randint(0, vocab, (tokens,), device=device)
    safety_ids = torch.randperm(vocab, device=device)[:ids]
    return hidden, head, target, safety_ids, torch.randn(tokens, ids, device=device)


def cpu_dtype() -> torch.dtype:
    """Return bfloat16, or float32 if the CPU has no fast matrix product in bfloat16.

    On an x86 CPU without AVX-512 it is about 50 times slower than in float32.
    """
    slow = torch.backends.cpu.get_cpu_capability() in ("AVX2", "DEFAULT")
    return torch.float32 if slow else torch.bfloat16


def measure_loss_memory(
    tokens: int = 2048, *, width: int = 576, vocab: int = 49152, ids: int = 64
) -> list[LossMemory]:
    """Measure both losses in `cpu_dtype()` with a frozen head, each in a fresh process.

    Args:
        tokens: N of the measured point.
        width: D.
        vocab: V.
        ids: K.

    Returns:
        One entry for `tokens` and one for four times as many. The second is measured only if 10 GB
        are free, else computed from the first (both grow linearly in N; ours less).

    Raises:
        RuntimeError: a child failed; the message has its last line.
    """
    entries: list[LossMemory] = []
    for count in (tokens, 4 * tokens):
        if entries and available_bytes() < _FREE_BYTES_FOR_LONG:
            first = entries[0]
            entries.append(LossMemory(count, 4 * first.by_hand, 4 * first.ours, False))
            continue
        shape = {"tokens": count, "width": width, "vocab": vocab, "ids": ids}
        by_hand, ours = (peak_in_child(name, **shape) for name in ("by_hand", "ours"))
        entries.append(LossMemory(count, by_hand, ours, measured=True))
    return entries


def measure_peak(run: Callable[[], object], device: str = "cpu") -> int | None:
    """Return the peak bytes that `run` takes above what is allocated before it.

    Measured by torch's allocator on a GPU and by the process's peak on Linux; elsewhere None.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not _CLEAR_REFS.exists():
        return None
    _CLEAR_REFS.write_text("5", encoding="ascii")  # resets the peak
    before = _status_bytes("VmRSS")
    run()
    return max(0, _status_bytes("VmHWM") - before)


def available_bytes() -> int:
    """Return the bytes available without swapping; 0 if the system does not report them."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields.get("MemAvailable", "0 kB").split()[0]) * 1024


def peak_in_child(provider: str, **shape: int) -> int:
    """Return the peak bytes of one forward and backward pass in a fresh process, on the CPU.

    A process keeps freed memory, which would hide later allocations; a fresh one has none.

    Args:
        provider: "by_hand" or "ours".
        shape: tokens, width, vocab and ids.

    Raises:
        RuntimeError: the child failed; the message has its last line.
    """
    job = {"provider": provider, **shape}
    return int(in_child("str_kernels.loss_memory", job, f"{provider} with {shape}"))


def _child(job: dict[str, Any]) -> int:
    loss = PROVIDERS[job["provider"]]
    shape = (job["width"], job["vocab"], job["ids"], cpu_dtype())
    torch.manual_seed(0)
    inputs = random_inputs(job["tokens"], *shape)
    loss(*random_inputs(1, *shape)).backward()  # libraries allocate their buffers at first use
    peak = measure_peak(lambda: loss(*inputs).backward())
    if peak is None:
        raise RuntimeError(f"{_CLEAR_REFS} is missing: memory is measured on Linux only")
    return peak


def _status_bytes(name: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {name}")


if __name__ == "__main__":
    print(_child(json.loads(sys.argv[1])))
