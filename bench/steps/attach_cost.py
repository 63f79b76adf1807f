"""What attach() costs a training step of a real model: time against its own loss, peak memory."""

from __future__ import annotations

from typing import Any

import torch

from str_kernels import AnchorPrompts, SafetyTokens, attach
from str_kernels.integrations.anchors.prompts import AnchorRow
from str_kernels.integrations.models.loss_paths import HeadPath
from str_kernels.integrations.models.references import AdaptersOff

from ..memory.process import give_back, peak_of, run_in_child
from ..results import Row, origin
from .builtin import lora_model
from .timing import Step, all_rounds, milliseconds, ratio_quartiles

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
    """Time a step with the model's own loss, attached, and the reference's pass by itself.

    Args:
        tokens: in the row that is timed.
        memory_tokens: in the row whose memory is measured, on a CPU.
        ids: K.
        count: rounds.
        dtype: of the model.
        device: where it runs.

    Returns:
        A row for each, with quartiles in ms, `added` (None for the first and the last), and the
        peak in bytes of the steps, on a CPU.
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
    taken = all_rounds(steps, count, device)
    rows = []
    for who, seconds in taken.items():
        added = against = None
        if who != OWN:
            against = ratio_quartiles(seconds, taken[OWN])
        if who not in (OWN, REFERENCE):
            more = [mine - own for mine, own in zip(seconds, taken[OWN], strict=True)]
            added = ratio_quartiles(more, taken[REFERENCE])
        rows.append(
            base
            | {"who": who, **milliseconds(seconds)}
            | _quartiles("against_own", against)
            | _quartiles("added", added)
        )
    if device == "cpu":
        job = {"tokens": memory_tokens, "ids": ids, "dtype": base["dtype"]}
        for row in rows:
            if row["who"] != REFERENCE:
                row["peak_bytes"] = run_in_child(__name__, job | {"who": row["who"]}, row["who"])
    return rows


def _quartiles(name: str, values: tuple[float, float, float] | None) -> Row:
    low, middle, high = values or (None,) * 3
    return {name: middle, f"{name}_low": low, f"{name}_high": high}


def _step_of(who: str, tokens: int, ids: int, dtype: torch.dtype, device: str) -> Step:
    model = lora_model(dtype, ["q_proj", "v_proj"]).to(device).train()
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.vocab_size
    batch = {"input_ids": torch.randint(0, vocab, (1, tokens), generator=generator).to(device)}
    safety_ids = torch.randperm(vocab, generator=generator)[:ids]
    if who == REFERENCE:
        return _reference_pass(model, batch, safety_ids.to(device))
    batch["labels"] = batch["input_ids"]
    if who != OWN:
        held = SafetyTokens(ids=[] if who == NO_PENALTY else safety_ids.tolist())
        anchors = _anchors(vocab, generator) if who == ANCHORED else None
        path: Any = "logits" if who == LOGITS else "linear"
        attach(model, held, anchors=anchors, path=path, positions="response")

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


def main(job: dict[str, Any]) -> int:
    """Measure the peak of a step, in a child."""
    given = (job["ids"], getattr(torch, job["dtype"]), "cpu")
    _step_of(job["who"], 16, *given)()  # libraries allocate at first use
    step = _step_of(job["who"], job["tokens"], *given)
    give_back()
    return peak_of(step)
