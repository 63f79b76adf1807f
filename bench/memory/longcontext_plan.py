"""Memory of long rows of larger models, computed by the planner for cards of three sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import LlamaConfig

from str_kernels.integrations.plan.planner import PlanOptions, plan_of

from ..results import Row

TOKENS = (8192, 32768, 131072, 1048576)
CARDS = (24, 80, 141)  # GB
_USABLE = 0.9  # the rest is for the context, libraries and what an allocator cannot use
# the shapes of Llama 3.2 1B, 3.1 8B and 3.3 70B
SHAPES: dict[str, dict[str, Any]] = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}


def planned(
    tokens: Sequence[int] = TOKENS,
    shapes: Sequence[str] = tuple(SHAPES),
    advanced: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Plan a LoRA step of one row with gradient checkpointing, in bfloat16.

    Args:
        tokens: lengths of the row.
        shapes: names in SHAPES.
        advanced: called after each row.

    Returns:
        For each model and length the peaks in bytes with the model's own loss, naive STR and ours
        with anchors, and for each card whether they fit in 0.9 of it.
    """
    rows = []
    for name in shapes:
        config = LlamaConfig(
            vocab_size=128256, num_key_value_heads=8, max_position_embeddings=1 << 21,
            **SHAPES[name],
        )  # fmt: skip
        for count in tokens:
            options = PlanOptions(
                tokens=count, batch_size=1, dtype="bfloat16", attention="sdpa", checkpointing=True
            )
            ways = plan_of(config, options).ways
            row: Row = {"model": name, "tokens": count}
            for key, way in (("own", "own"), ("naive", "by_hand"), ("ours", "ours")):
                peak = ways[way].peak  # type: ignore[index] # of the planner's ways
                row[key] = peak
                for card in CARDS:
                    row[f"{key}_fits_{card}"] = peak <= _USABLE * card * 1e9
            rows.append(row)
            advanced()
    return rows


def smallest_card(row: Row, way: str) -> str:
    """Return the smallest card that a row's peak fits."""
    return next((f"{card} GB" for card in CARDS if row[f"{way}_fits_{card}"]), "none")
