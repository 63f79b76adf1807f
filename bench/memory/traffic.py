"""Bytes that the Triton kernels load and store, counted in Triton's interpreter on the CPU.

The bytes that a launch asks for are its active lanes times the element's size. A cache may serve
some of them, but each logit must be read once and each gradient written once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from str_kernels import SafetyPenalty, safety_cross_entropy, safety_linear_cross_entropy

from ..results import Row, origin
from ..steps.providers import version_of

PROTOCOL = (
    "Triton's interpreter, {tokens} rows, bfloat16: bytes of the lanes that are on, over all "
    "loads and stores of an op's launches, forward and backward."
)
_UPSTREAMS = (1.0, 0.5)  # of the loss; some libraries skip a pass over the gradient at exactly 1


@dataclass
class Traffic:
    """The bytes requested so far."""

    read: int = 0
    written: int = 0


def interpret() -> None:
    """Make Triton interpret its kernels; call it before anything imports triton.

    Raises:
        RuntimeError: triton is imported already, and compiles.
    """
    if "triton" in sys.modules:
        from triton import knobs

        if not knobs.runtime.interpret:
            raise RuntimeError("triton was imported before TRITON_INTERPRET=1 could be set")
    os.environ["TRITON_INTERPRET"] = "1"


@contextlib.contextmanager
def counting() -> Iterator[Traffic]:
    """Count the bytes that kernels run in the context load and store; needs the interpreter."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    traffic = Traffic()

    def bytes_of(pointers: Any, mask: Any) -> int:
        bits: int = pointers.get_element_ty().primitive_bitwidth
        return int(mask.data.sum()) * max(1, bits // 8)  # a bool takes a byte

    # Unmasked, block-pointer and descriptor accesses all end in the two masked ones. Atomics do
    # not; they read and write.
    load, store = Builder.create_masked_load, Builder.create_masked_store
    atomic = Builder.create_atomic_rmw

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        traffic.read += bytes_of(pointers, mask)
        return load(self, pointers, mask, *rest, **more)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.written += bytes_of(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_atomic(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.read += bytes_of(pointers, mask)
        traffic.written += bytes_of(pointers, mask)
        return atomic(self, op, pointers, value, mask, *rest)

    replaced = {
        "create_masked_load": (load, counted_load),
        "create_masked_store": (store, counted_store),
        "create_atomic_rmw": (atomic, counted_atomic),
    }
    for name, (_, counted) in replaced.items():
        setattr(Builder, name, counted)
    try:
        yield traffic
    finally:
        for name, (original, _) in replaced.items():
            setattr(Builder, name, original)


def bound(vocab: int, ids: int) -> int:
    """Return the bytes per row that our ops may ask for in bfloat16, forward and backward.

    These are two reads and one write of the row (6 V), and a little per safety id and per row.
    """
    return 6 * vocab + 32 * ids + 128


def minimum(vocab: int) -> int:
    """Return the least for any op: each bfloat16 logit read once, its gradient written once."""
    return 4 * vocab


def measure(vocab: int = 49152, ids: int = 64, tokens: int = 4) -> list[Row]:
    """Count forward and backward of our two ops, with and without the penalty, and of Liger's.

    Args:
        vocab: V.
        ids: K.
        tokens: N; more rows take longer and do not change the bytes per row.

    Returns:
        One row for each op and upstream gradient, with bytes per row of logits.
    """
    base = origin("cpu", PROTOCOL.format(tokens=tokens)) | {"N": tokens, "V": vocab, "K": ids}
    logits = torch.randn(tokens, vocab).bfloat16()
    target = torch.randint(0, vocab, (tokens,))
    safety = (torch.randperm(vocab)[:ids], torch.randn(tokens, ids))
    hidden, head = torch.randn(tokens, 16).bfloat16(), torch.randn(vocab, 16).bfloat16()

    def from_logits(x: Tensor, given: tuple[Tensor, ...] = ()) -> Tensor:
        return safety_cross_entropy(
            x, target, *given, penalty=SafetyPenalty(0.1), backend="triton"
        ).loss

    def from_hidden(x: Tensor, given: tuple[Tensor, ...] = ()) -> Tensor:
        return safety_linear_cross_entropy(
            x, head, target, *given, penalty=SafetyPenalty(0.1), backend="triton"
        ).loss

    rows = []
    for name, loss, leaf in (
        ("ours, logits path", from_logits, logits),
        ("ours, linear path", from_hidden, hidden),
    ):
        for upstream in _UPSTREAMS:
            mine = (base, upstream, "str-kernels")
            whole = _count(*mine, name, functools.partial(loss, given=safety), leaf)
            plain = _count(*mine, f"{name}, no penalty", loss, leaf)
            whole["penalty_percent"] = 100 * (whole["bytes"] / plain["bytes"] - 1)
            rows += [whole, plain]
    return rows + _liger(base, logits, target)


def _liger(base: Row, logits: Tensor, target: Tensor) -> list[Row]:
    name = "Liger, cross-entropy"
    if importlib.util.find_spec("liger_kernel") is None:
        return [base | {"op": name, "why": "package liger_kernel is not installed"}]
    from liger_kernel.transformers.functional import liger_cross_entropy

    def loss(x: Tensor) -> Tensor:
        found: Tensor = liger_cross_entropy(x * 1, target)  # it overwrites its input
        return found

    return [_count(base, upstream, "liger-kernel", name, loss, logits) for upstream in _UPSTREAMS]


def _count(
    base: Row,
    upstream: float,
    package: str,
    name: str,
    loss: Callable[[Tensor], Tensor],
    leaf: Tensor,
) -> Row:
    x = leaf.detach().clone().requires_grad_()
    with counting() as traffic:
        (loss(x) * upstream).backward()
    tokens, vocab, ids = base["N"], base["V"], base["K"]
    read, written = traffic.read / tokens, traffic.written / tokens
    return base | {
        "op": name,
        "version": f"{package} {version_of(package)}",
        "upstream": upstream,
        "read": read,
        "written": written,
        "bytes": read + written,
        "of_vocab": (read + written) / vocab,
        "bound": bound(vocab, ids),
        "within_bound": read + written <= bound(vocab, ids) if name.startswith("ours") else None,
        "of_minimum": (read + written) / minimum(vocab),
        "penalty_percent": None,
        "why": "",
    }
