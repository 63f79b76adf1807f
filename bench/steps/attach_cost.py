"""What attach() costs a training step of a real model: time against its own loss, peak memory.

`python -m bench.steps.attach_cost '{"who": "attached", "tokens": 4096, ...}'` is the process that
measures memory; it is a new one, because a CPU process keeps the memory that it freed.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import torch

from str_kernels import AnchorPrompts, SafetyTokens, attach
from str_kernels.files.child_process import in_child
from str_kernels.integrations.anchors.prompts import AnchorRow
from str_kernels.integrations.loading.builtin_model import builtin_model_folder
from str_kernels.integrations.models.loss_paths import HeadPath
from str_kernels.integrations.models.references import AdaptersOff
from str_kernels.loss_memory import measure_peak

from ..results import ROOT, Row, origin
from .timing import Step, quartiles, ratio_quartiles, times_of_all

OWN, ATTACHED, LOGITS = "own loss", "attached", "attached, path='logits'"
ANCHORED = "attached, 4 anchors of 24 tokens"
REFERENCE, NO_PENALTY = "reference pass", "attached, no ids"

PROTOCOL = (
    "The built-in model (SmolLM2-135M) with LoRA r = 8 on q_proj and v_proj, one row of random "
    "tokens, each a label; forward and backward. {count} interleaved rounds, the first of them "
    "another each round; quartiles of the rounds. added = (step - own loss) / reference pass, of "
    "each round. Memory: the process's peak above what it held before the step, each in a fresh "
    "process."
)


def measure(
    tokens: int = 1024,
    memory_tokens: int = 4096,
    ids: int = 64,
    count: int = 5,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[Row]:
    """Time a step with the model's own loss, a step when attached, and the reference's forward.

    Args:
        tokens: in the row that is timed.
        memory_tokens: in the row whose memory is measured, on a CPU.
        ids: K.
        count: rounds.
        dtype: of the model.
        device: where it runs.

    Returns:
        A row for each, with quartiles in ms, `added` (None for the first and the last), and, on a
        CPU, the peak of the steps in bytes.
    """
    base = origin(device, PROTOCOL.format(count=count)) | {
        "tokens": tokens,
        "memory_tokens": memory_tokens,
        "K": ids,
        "dtype": str(dtype).removeprefix("torch."),
    }
    steps = {
        who: _step_of(who, tokens, ids, dtype, device)
        for who in (OWN, ATTACHED, ANCHORED, LOGITS, NO_PENALTY, REFERENCE)
    }
    taken = times_of_all(steps, count, device)
    rows = []
    for who, seconds in taken.items():
        low, middle, high = (1000 * value for value in quartiles(seconds))
        added = against = None
        if who != OWN:
            against = ratio_quartiles(seconds, taken[OWN])
        if who not in (OWN, REFERENCE):
            more = [mine - own for mine, own in zip(seconds, taken[OWN], strict=True)]
            added = ratio_quartiles(more, taken[REFERENCE])
        rows.append(
            base
            | {"who": who, "median_ms": middle, "low_ms": low, "high_ms": high}
            | _quartiles("against_own", against)
            | _quartiles("added", added)
        )
    if device == "cpu":
        for row in rows:
            if row["who"] != REFERENCE:
                row["peak_bytes"] = _peak_in_child(row["who"], memory_tokens, ids, dtype)
    return rows


def _quartiles(name: str, values: tuple[float, float, float] | None) -> Row:
    low, middle, high = values or (None,) * 3
    return {name: middle, f"{name}_low": low, f"{name}_high": high}


def _step_of(who: str, tokens: int, ids: int, dtype: torch.dtype, device: str) -> Step:
    """Make a new model for each: models that share weights would also share their caches."""
    model = _model(dtype).to(device).train()
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.vocab_size
    batch = {"input_ids": torch.randint(0, vocab, (1, tokens), generator=generator).to(device)}
    safety_ids = torch.randperm(vocab, generator=generator)[:ids]
    if who == REFERENCE:
        return _reference_pass(model, batch, safety_ids.to(device))
    batch["labels"] = batch["input_ids"]
    if who != OWN:
        chosen = safety_ids[:0] if who == NO_PENALTY else safety_ids
        tokens_of = SafetyTokens(ids=chosen.tolist())
        anchors = _anchors(vocab, generator) if who == ANCHORED else None
        attach(
            model,
            tokens_of,
            anchors=anchors,
            path="logits" if who == LOGITS else "linear",
            positions="response",
        )

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(**batch, use_cache=False).loss.backward()

    return step


def _anchors(vocab: int, generator: torch.Generator) -> AnchorPrompts:
    rows = torch.randint(0, vocab, (4, 24), generator=generator).tolist()
    return AnchorPrompts([AnchorRow(tuple(row)) for row in rows], per_step=4)


def _reference_pass(model: Any, batch: dict[str, Any], safety_ids: torch.Tensor) -> Step:
    inner = model.get_base_model()
    path = HeadPath(inner)
    path.open()
    reference = AdaptersOff(model, inner, inner.forward, path)
    return lambda: reference(safety_ids, batch, False)


def _model(dtype: torch.dtype) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar for each model loaded
    model = AutoModelForCausalLM.from_pretrained(builtin_model_folder(), dtype=dtype)
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def _peak_in_child(who: str, tokens: int, ids: int, dtype: torch.dtype) -> int:
    job = {
        "who": who,
        "tokens": tokens,
        "ids": ids,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
    return int(in_child("bench.steps.attach_cost", job, f"the memory of {who}", folder=ROOT))


def _child(job: dict[str, Any]) -> int:
    torch.set_num_threads(job["threads"])
    dtype = getattr(torch, job["dtype"])
    _step_of(job["who"], 16, job["ids"], dtype, "cpu")()  # libraries allocate at first use
    step = _step_of(job["who"], job["tokens"], job["ids"], dtype, "cpu")
    ctypes.CDLL(None).malloc_trim(0)  # else memory that the warm-up freed would not count again
    peak = measure_peak(step)
    if peak is None:
        raise RuntimeError("/proc/self/clear_refs is missing: memory is measured on Linux only")
    return peak


if __name__ == "__main__":
    print(_child(json.loads(sys.argv[1])))
