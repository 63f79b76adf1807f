"""What anchors, or a penalty on the rows, add to the time of a training step of a real model."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from transformers import AutoTokenizer

from str_kernels import AnchorPrompts, SafetyTokens, attach
from str_kernels.integrations.loading.builtin_model import builtin_model_folder

from ..results import Row, origin
from .cache_cost import lora_model
from .timing import Step, quartiles, ratio_quartiles, times_of_all

OWN, NO_IDS = "own loss", "attached, no ids"
ANCHORS, ROWS = "anchors alone (default)", "on the rows (paper)"
NEW_ANCHORS = "anchors alone, all new"

_TURNS = 33  # steps with 2 + 2 anchors until each of the 132 has been used

PROTOCOL = (
    "The built-in model (SmolLM2-135M) with LoRA r = 8 on all linear layers but the head, rows of "
    "random tokens, the last quarter of each labels; forward, backward and AdamW. Anchors: the "
    "package's, 2 + 2 a step, in each step others. The reference has read all of them, as it has "
    "after the first 33 steps of a run; 'all new': none of the step's. {count} interleaved "
    "rounds, the first step of them another each round; quartiles of the rounds and of their "
    "ratios to the same step attached without safety ids."
)


def measure(
    rows: int = 8, tokens: int = 512, count: int = 7, dtype: torch.dtype = torch.bfloat16
) -> list[Row]:
    """Time a step with the model's own loss, plain, with anchors and with a penalty on the rows.

    Args:
        rows: in the batch.
        tokens: in each row.
        count: rounds.
        dtype: of the model.

    Returns:
        A row for each, with quartiles in ms and of the ratios to the plain step.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = {
        who: _step_of(who, rows, tokens, dtype, device)
        for who in (OWN, NO_IDS, ANCHORS, NEW_ANCHORS, ROWS)
    }
    taken = times_of_all(steps, count, device)
    base = origin(device, PROTOCOL.format(count=count)) | {
        "rows": rows,
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
    }
    made = []
    for who, seconds in taken.items():
        low, middle, high = (1000 * value for value in quartiles(seconds))
        row = base | {"who": who, "median_ms": middle, "low_ms": low, "high_ms": high}
        for name, other in (("no_ids", NO_IDS), ("own", OWN)):
            against = ratio_quartiles(seconds, taken[other])
            names = (f"{name}_low", f"against_{name}", f"{name}_high")
            row |= dict(zip(names, against or (), strict=True))
        made.append(row)
    return made


def _step_of(who: str, rows: int, tokens: int, dtype: torch.dtype, device: str) -> Step:
    model = lora_model(dtype).to(device).train()
    tokenizer = AutoTokenizer.from_pretrained(builtin_model_folder())
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, model.config.vocab_size, (rows, tokens), generator=generator)
    labels = input_ids.clone()
    labels[:, : 3 * tokens // 4] = -100
    batch: dict[str, Any] = {"input_ids": input_ids.to(device), "labels": labels.to(device)}
    handle = None
    if who != OWN:
        held = SafetyTokens(ids=[]) if who == NO_IDS else SafetyTokens.from_templates(tokenizer)
        alone = who in (ANCHORS, NEW_ANCHORS)
        anchors = AnchorPrompts.default(tokenizer) if alone else None
        where = "none" if alone else "response"
        handle = attach(model, held, anchors=anchors, positions=where)  # type: ignore[arg-type]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    turns = itertools.count()
    if handle is not None and who == ANCHORS:
        with torch.no_grad():
            for turn in range(_TURNS):  # the reference reads each anchor
                handle.step = turn
                model(**{name: value[:1, -2:] for name, value in batch.items()}, use_cache=False)

    def step() -> None:
        if handle is not None:
            handle.step = next(turns)
        optimizer.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()

    return step
