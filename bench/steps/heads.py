"""The heads that are measured, which are those of well-known models."""

from __future__ import annotations

from typing import NamedTuple


class HeadShape(NamedTuple):
    """A head, and its model's transform of raw logits u: z = softcap tanh(scale u / softcap)."""

    vocab: int  # V
    width: int  # D
    logit_scale: float = 1.0
    softcap: float | None = None


HEADS = {
    "smollm2": HeadShape(49152, 576),
    "llama-3": HeadShape(128256, 4096),
    "qwen2.5": HeadShape(151936, 3584),
    "gemma-2": HeadShape(256000, 2304, softcap=30.0),
}
