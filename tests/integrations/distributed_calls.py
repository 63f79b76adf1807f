"""What runs on the ranks of test_distributed.py, named: its table is in docs/support.md."""

from __future__ import annotations

from typing import Any

UNITS = "fsdp, head its own unit"
TOGETHER = "fsdp, head and embedding one unit"
REFUSED = ("refusals", "lora on the head")
PRELOADED = (
    "peft",
    "peft.tuners.lora.model",
    "str_kernels.integrations.attach.hook",
    "transformers.distributed.tensor_parallel",
    "transformers.modeling_utils",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gemma2.configuration_gemma2",
)  # fmt: skip
BUSY = {"anchors": True, "micro_steps": 2}
ALONE = {**BUSY, "positions": "none"}


def calls(ranks: int, seed: int, folder: str) -> dict[str, tuple[Any, ...]]:
    """Name what runs on so many ranks: (function of distributed_cases, its arguments, options)."""
    data = "data_parallel"
    found: dict[str, tuple[Any, ...]] = {}
    for training in ("lora", "full"):
        if ranks == 2:
            found |= {
                f"ddp {training}": (data, "ddp", "llama", training, seed, BUSY),
                f"fsdp {training}": (data, "fsdp", "llama", training, seed, BUSY),
                f"{UNITS} {training}": (data, UNITS, "llama", training, seed, BUSY),
                f"ddp, anchors alone {training}": (data, "ddp", "llama", training, seed, ALONE),
                f"{UNITS}, anchors alone {training}": (data, UNITS, "llama", training, seed, ALONE),
                f"tensor parallel, anchors alone {training}": (
                    *("tensor_parallel", training, seed, folder),
                    {"anchors": True, "positions": "none"},
                ),
                f"fsdp tied {training}": (data, "fsdp", "llama-tied", training, seed, {}),
                f"{TOGETHER} {training}": (data, TOGETHER, "llama-tied", training, seed, {}),
                f"fsdp logits {training}": (
                    data, "fsdp", "llama", training, seed, {"path": "logits"},
                ),
                f"tensor parallel logits {training}": (
                    "tensor_parallel", training, seed, folder, {"path": "logits"},
                ),
            }  # fmt: skip
        else:
            found[f"{UNITS} {training}"] = (data, UNITS, "llama", training, seed, {})
            found[f"fsdp and tensor parallel {training}"] = (
                "fsdp_and_tensor_parallel", training, seed, {},
            )  # fmt: skip
        found[f"tensor parallel {training}"] = (
            "tensor_parallel", training, seed, folder, {"anchors": True},
        )  # fmt: skip
    found["split sequence"] = ("split_sequence", seed, {})
    if ranks == 2:
        found["refusals"] = ("refusals", seed, {})
        found["lora on the head"] = ("lora_on_a_spread_head", seed, folder, {})
    return found
