"""Peak memory of one provider in a process of its own."""

from __future__ import annotations

from typing import Any

import torch

from ..inputs import draw_inputs
from ..steps.heads import HeadShape
from ..steps.providers import ALL_OPTIONS, bare_products, providers
from .process import give_back, peak_of, run_in_child

FLOOR = "bare products"


def peak_in_child(
    provider: str,
    shape: HeadShape,
    tokens: int,
    ids: int,
    dtype: torch.dtype = torch.bfloat16,
    train_head: bool = False,
) -> int:
    """Return the bytes that a forward and backward takes above its inputs, on the CPU.

    Args:
        provider: a name of `providers()`, or "bare products".
        shape: V, D, scale and cap.
        tokens: N.
        ids: K.
        dtype: of hidden states and head.
        train_head: whether the head's gradient is made too.

    Raises:
        RuntimeError: the child failed; the message has its last line.
    """
    job = {"provider": provider, "shape": shape, "tokens": tokens, "ids": ids}
    job |= {"dtype": str(dtype).removeprefix("torch."), "train_head": train_head}
    return int(run_in_child(__name__, job, provider))


def main(job: dict[str, Any]) -> int:
    """Measure the provider of a job, in the child."""
    name, tokens = job["provider"], job["tokens"]
    found = {p.name: p for p in providers(all_options=True)}
    provider = found.get(name)
    if provider is None and name != FLOOR:
        raise ValueError(f"`provider` must be one of {', '.join([*found, FLOOR])}; got {name!r}")
    inputs = draw_inputs(
        HeadShape(*job["shape"]),
        tokens,
        job["ids"],
        getattr(torch, job["dtype"]),
        train_head=job["train_head"],
        log_probs=name.endswith(ALL_OPTIONS),
    )

    def step(rows: int) -> None:
        part = inputs if rows == tokens else inputs.first(rows)
        if provider is None:
            bare_products(part)
        else:
            torch.autograd.grad(provider.loss(part), part.leaves())

    # Libraries allocate their buffers at first use, and a compiler its memory, for this very shape.
    step(tokens if provider is not None and provider.warm_up_whole else 1)
    give_back()
    return peak_of(lambda: step(tokens))
