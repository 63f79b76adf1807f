"""What holds the memory of a training step with gradient checkpointing, computed by part.

The step runs on fake tensors (see str_kernels.integrations.plan.memory_ledger), so 32,768 tokens
take seconds. A storage belongs to the module whose forward made it, or to the gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from str_kernels.integrations.models.adapters import base_of
from str_kernels.integrations.models.heads import find_head
from str_kernels.integrations.plan.memory_ledger import counting
from str_kernels.integrations.plan.planner import read_config
from str_kernels.integrations.plan.step_memory import checkpoint_layers, meta_model

from ..results import Row

FORWARD, LOSS, BACKWARD = "forward", "own loss", "backward"
BOUNDARIES, GRADIENTS = "layers' inputs", "gradients"
_WEIGHTS = "weights"
# of the built-in model's modules, the innermost of them first
_PARTS = {
    "lora_A": "adapters, float32",
    "lora_B": "adapters, float32",
    "lora_dropout": "adapters, float32",
    "_proj": "linear, with float32 copies",
    "self_attn": "attention",
    "mlp": "MLP",
    "act_fn": "MLP",
    "layernorm": "norms",
    "norm": "norms",
    "embed_tokens": "embeddings",
}


def parts_of(tokens: Sequence[int], rank: int = 8) -> list[Row]:
    """Count the parts at the peak of each phase.

    Args:
        tokens: of the one row.
        rank: of the adapters.

    Returns:
        For each length, phase and part its bytes above the weights, in total and per token.
    """
    rows = []
    for count in tokens:
        for phase, parts in _at_peaks(count, rank).items():
            found = [(part, size) for part, size in parts.most_common() if size >= count]
            found.append(("all", sum(parts.values())))
            rows += [
                {
                    "tokens": count,
                    "phase": phase,
                    "part": part,
                    "bytes": size,
                    "bytes_a_token": size / count,
                }
                for part, size in found
            ]
    return rows


def backward_bytes(rows: Sequence[Row]) -> int:
    """Return the peak of the backward through the layers, from rows of one length."""
    (found,) = (row["bytes"] for row in rows if (row["phase"], row["part"]) == (BACKWARD, "all"))
    return int(found)


def _at_peaks(tokens: int, rank: int) -> dict[str, Counter[str]]:
    model = meta_model(read_config("builtin"), torch.bfloat16, "sdpa", rank)
    checkpoint_layers(model)
    model.train()
    now = _Now(model)
    with counting(model, part=now.part) as ledger:
        ids = torch.zeros((1, tokens), dtype=torch.int64)
        now.phase = FORWARD
        model(input_ids=ids, labels=ids).loss.backward()
    live: Counter[str] = Counter()
    peaks: dict[str, tuple[int, Counter[str]]] = {}
    for size, label in ledger.events:
        phase, part = label.split("|")
        if phase == _WEIGHTS:
            continue
        live[part] += size
        total = sum(live.values())
        if size > 0 and total > peaks.get(phase, (0,))[0]:
            peaks[phase] = total, Counter(live)
    return {phase: parts for phase, (_, parts) in peaks.items()}


class _Now:
    """Tracks the current phase of the step and the innermost module whose forward is running."""

    def __init__(self, model: Any) -> None:
        self.phase = _WEIGHTS
        self._inside: list[str] = []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._entering(name))
            module.register_forward_hook(self._leave, always_call=True)
        head: Any = find_head(base_of(model))
        head.register_forward_pre_hook(self._at_head)

    def part(self) -> str:
        name = self._inside[-1] if self._inside else ""
        if self.phase == LOSS:
            part = "logits and copies"
        elif self.phase == FORWARD and name.rpartition(".")[2].isdigit():
            part = BOUNDARIES
        elif self.phase == BACKWARD and not name:
            part = GRADIENTS
        else:
            last = ".".join(name.split(".")[-2:])
            part = next((part for key, part in _PARTS.items() if key in last), "other")
        return f"{self.phase}|{part}"

    def _entering(self, name: str) -> Any:
        def enter(module: nn.Module, args: Any) -> None:
            self._inside.append(name)

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside.pop()

    def _at_head(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.phase = LOSS
        args[0].register_hook(self._at_gradient)

    def _at_gradient(self, gradient: Tensor) -> None:
        self.phase = BACKWARD
