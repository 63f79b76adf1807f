"""Speed of the linear path: ours against the loss by hand (eager) and the two bare products."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from str_kernels import safety_linear_cross_entropy
from str_kernels.backends import choose_backend
from str_kernels.loss_memory import loss_by_hand, measure_peak, peak_in_child, random_inputs

PROTOCOL = (
    "Forward and backward; medians of {pairs} rounds in which every provider runs once, in turn; "
    "'against eager' is the median of the rounds' ratios. Gradient error: largest entry of the "
    "difference to float32 by hand, over its largest entry. The bare products are what the head "
    "costs without any loss."
)


class HeadShape(NamedTuple):
    """The head of a known model."""

    vocab: int
    width: int


HEADS = {
    "smollm2": HeadShape(49152, 576),
    "llama-3": HeadShape(128256, 4096),
    "qwen2.5": HeadShape(151936, 3584),
    "gemma-2": HeadShape(256000, 2304),
}

Provider = Callable[..., Tensor]


def measure(
    shape: HeadShape,
    tokens: int,
    ids: int,
    dtype: torch.dtype,
    train_head: bool,
    pairs: int,
    device: str,
) -> list[dict[str, Any]]:
    """Time every provider on fresh random inputs.

    Raises:
        RuntimeError: a provider's loss or gradient is not eager's; nothing is timed then.
    """
    inputs = random_inputs(tokens, shape.width, shape.vocab, ids, dtype, device)
    leaves = [inputs[0]]
    if train_head:
        leaves.append(inputs[1].requires_grad_())
    providers = _providers(device, dtype)
    errors = {name: _check(name, run, inputs, leaves) for name, run in providers.items()}
    timed: dict[str, Callable[[], None]] = {
        name: _step(run, inputs, leaves) for name, run in providers.items()
    }
    timed["bare products"] = lambda: _bare_products(inputs, train_head)
    times: dict[str, list[float]] = {name: [] for name in timed}
    for round_number in range(pairs + 1):
        for name, run in timed.items():
            seconds = _seconds(run, device)
            if round_number:  # the first round warms up
                times[name].append(seconds)
    rows = []
    for name, seconds_list in times.items():
        ratios = [t / e for t, e in zip(seconds_list, times["eager"], strict=True)]
        quarter = statistics.quantiles(seconds_list, n=4) if pairs > 1 else [seconds_list[0]] * 3
        rows.append(
            {
                "provider": name,
                "N": tokens,
                "D": shape.width,
                "V": shape.vocab,
                "K": ids,
                "dtype": str(dtype).removeprefix("torch."),
                "train_head": train_head,
                "median_ms": 1e3 * statistics.median(seconds_list),
                "quartiles_ms": [1e3 * quarter[0], 1e3 * quarter[2]],
                "against_eager": statistics.median(ratios),
                "gradient_error": errors.get(name),
                "extra_memory_bytes": _extra_memory(name, timed[name], device, inputs, train_head),
                "pairs": pairs,
                "device": device_name(device),
                "torch": torch.__version__,
                "triton": _version("triton"),
            }
        )
    return rows


def device_name(device: str) -> str:
    """Return the card's name, or the CPU's with the number of threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _providers(device: str, dtype: torch.dtype) -> dict[str, Provider]:
    backends = ["torch"]
    if choose_backend("auto", torch.device(device), dtype) == "triton":
        backends.append("triton")
    found: dict[str, Provider] = {"eager": loss_by_hand}
    for backend in backends:

        def ours(*inputs: Tensor, backend: str = backend) -> Tensor:
            return safety_linear_cross_entropy(*inputs, backend=backend).loss

        found[f"ours ({backend})"] = ours
    return found


def _step(run: Provider, inputs: tuple[Tensor, ...], leaves: list[Tensor]) -> Callable[[], None]:
    def step() -> None:
        torch.autograd.grad(run(*inputs), leaves)

    return step


def _extra_memory(
    name: str, run: Callable[[], None], device: str, inputs: tuple[Tensor, ...], train_head: bool
) -> int | None:
    """Return the peak above the inputs: the allocator's on a GPU, a fresh process's on a CPU."""
    if device == "cuda":
        return measure_peak(run, device)
    provider = {"eager": "by_hand", "ours (torch)": "ours"}.get(name)
    if provider is None or train_head or inputs[0].dtype != torch.bfloat16:
        return None  # what the child measures is the frozen head in bfloat16
    tokens, width = inputs[0].shape
    vocab, ids = inputs[1].shape[0], inputs[3].shape[0]
    return peak_in_child(provider, tokens=tokens, width=width, vocab=vocab, ids=ids)


def _bare_products(inputs: tuple[Tensor, ...], train_head: bool) -> None:
    """Multiply as every exact method must: logits, then the gradients they lead to."""
    hidden, head = inputs[0].detach(), inputs[1].detach()
    logits = hidden @ head.t()
    logits @ head
    if train_head:
        logits.t() @ hidden


def _check(name: str, run: Provider, inputs: tuple[Tensor, ...], leaves: list[Tensor]) -> float:
    """Return the gradient's error against float32 on the first rows; refuse a wrong provider."""
    rows = min(64, inputs[0].shape[0])
    hidden, head, target, ids, ref = inputs
    part = (hidden.detach()[:rows].requires_grad_(), head.detach(), target[:rows], ids, ref[:rows])
    exact = (part[0].detach().float().requires_grad_(), head.detach().float(), *part[2:])
    loss, truth = run(*part), loss_by_hand(*exact)
    (grad,) = torch.autograd.grad(loss, part[0])
    (wanted,) = torch.autograd.grad(truth, exact[0])
    error = float((grad.float() - wanted).abs().max() / wanted.abs().max())
    # bfloat16 rounds dZ, then dX: each 2^-9 of the largest entries, and sums of them
    limit = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[hidden.dtype]
    off = abs(float(loss.detach()) - float(truth.detach())) / float(truth.detach())
    if not (error <= limit and off <= limit):
        raise RuntimeError(f"{name} is wrong: loss off by {off:.1e}, gradient by {error:.1e}")
    return error


def _seconds(run: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
