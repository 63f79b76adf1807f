"""The table of docs/support.md that says how a model may be spread over ranks.

Every cell is read off the lists of what test_distributed.py and test_deepspeed.py run.
"""

from __future__ import annotations

import deepspeed_cases
import distributed_calls
from distributed_calls import TOGETHER, UNITS

TRAINING = "test_distributed_training.py::"
SPREAD = f"{TRAINING}test_a_spread_model_logs_what_a_whole_one_does"
# The name of a setup, as those tests call it, and the test of SafetyTrainer on it.
SETUPS = {
    "DDP": ("ddp", f"{TRAINING}test_a_checkpoint_of_two_ranks_goes_on_with_one_and_with_four"),
    "FSDP2, the head in the root's unit": ("fsdp", f"{SPREAD}[fsdp2]"),
    "FSDP2, the head a unit of its own": (UNITS, ""),
    "FSDP2, a tied head in the root's unit": ("fsdp tied", ""),
    "FSDP2, a tied head and the embeddings one unit": (TOGETHER, ""),
    "Tensor parallelism by transformers' plan": ("tensor parallel", f"{SPREAD}[tensor-parallel]"),
    "FSDP2 over tensor parallelism": ("fsdp and tensor parallel", ""),
    "A sequence split over ranks, with shift_labels": ("split sequence", ""),
    "ZeRO-1": ("ZeRO-1", ""),
    "ZeRO-2": (
        "ZeRO-2",
        "test_deepspeed.py::test_safety_trainer_logs_what_it_logs_without_deepspeed",
    ),
    "ZeRO-3": (
        "ZeRO-3",
        "test_deepspeed.py::test_safety_trainer_logs_what_it_logs_without_deepspeed",
    ),
}
HEAD = ("spread by", "LoRA", "full fine-tuning", "with anchors", "anchors alone",
        '`path="logits"`', "SafetyTrainer")  # fmt: skip
Run = tuple[int, str, dict[str, object]]  # ranks, the name of a call, its options


def runs() -> list[Run]:
    """List what the two files run."""
    found = [
        (ranks, name, call[-1])
        for ranks in (2, 4)
        for name, call in distributed_calls.calls(ranks, 0, "").items()
        if name not in distributed_calls.REFUSED
    ]
    return found + [(2, name, call[-1]) for name, call in deepspeed_cases.CALLS.items()]


def rows() -> list[tuple[str, ...]]:
    """Return the table: in a cell the numbers of ranks that a test runs."""
    return [(setup, *_cells(name), _short(test)) for setup, (name, test) in SETUPS.items()]


def _cells(name: str) -> tuple[str, ...]:
    of_setup = [run for run in runs() if _is_of(name, run[1])]
    on_logits = [run for run in of_setup if "logits" in run[1]]
    alone = [run for run in of_setup if "anchors alone" in run[1]]
    others = [run for run in of_setup if run not in on_logits + alone]
    busy = [run for run in others if run[2].get("anchors")]
    lora = [run for run in others if "lora" in run[1]]
    full = [run for run in others if "lora" not in run[1]]
    return tuple(map(_ranks, (lora, full, busy, alone, on_logits)))


def _is_of(name: str, call: str) -> bool:
    """Tell a call of a setup from one of another whose name begins alike."""
    rest = call.removeprefix(name)
    kinds = ("", " logits", ", anchors alone")
    endings = ("", *(f"{kind} {training}" for kind in kinds for training in ("lora", "full")))
    return call.startswith(name) and (rest in endings or name.startswith("ZeRO"))


def _ranks(found: list[Run]) -> str:
    return ", ".join(str(x) for x in sorted({ranks for ranks, *_ in found})) or "-"


def _short(test: str) -> str:
    return f"`{test.split('::')[1]}`" if test else "-"
