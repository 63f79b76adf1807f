"""How much of the penalty's cost in a training step of a real model a reference cache saves."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from str_kernels import SafetyTokens, attach
from str_kernels.integrations.loading.builtin_model import builtin_model_folder
from str_kernels.integrations.reference_cache.reading import cache_model
from str_kernels.reference_cache.reader import CachedReference

from ..results import Row, origin
from .timing import Step, quartiles, ratio_quartiles, times_of_all

NO_IDS, CACHED, COLLATED, LIVE = "no ids", "cached", "cached, by collator", "live reference"

PROTOCOL = (
    "The built-in model (SmolLM2-135M) with LoRA r = 8 on all linear layers but the head, rows of "
    "random tokens, each a label; forward, backward and AdamW. {count} interleaved rounds, the "
    "first step of them another each round; quartiles of the rounds and of their ratios to the "
    "same step without safety ids. By collator: the look-up is in the data loader, not in the step."
)


def measure(
    rows: int = 2,
    tokens: int = 128,
    ids: int = 64,
    count: int = 7,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[Row]:
    """Time a step without safety ids, with the cache, and with the live reference.

    Args:
        rows: in the batch.
        tokens: in each row.
        ids: K.
        count: rounds.
        dtype: of the model.
        device: where it runs.

    Returns:
        A row for each, with quartiles in ms and of the ratios to the step without ids.
    """
    with tempfile.TemporaryDirectory() as folder:
        steps = {
            who: _step_of(who, rows, tokens, ids, dtype, device, Path(folder) / "cache")
            for who in (NO_IDS, CACHED, COLLATED, LIVE)
        }
        taken = times_of_all(steps, count, device)
    base = origin(device, PROTOCOL.format(count=count)) | {
        "rows": rows,
        "tokens": tokens,
        "K": ids,
        "dtype": str(dtype).removeprefix("torch."),
    }
    made = []
    for who, seconds in taken.items():
        low, middle, high = (1000 * value for value in quartiles(seconds))
        row = base | {"who": who, "median_ms": middle, "low_ms": low, "high_ms": high}
        if who != NO_IDS:
            ratios = ratio_quartiles(seconds, taken[NO_IDS])
            names = ("against_low", "against_no_ids", "against_high")
            row |= dict(zip(names, ratios or (), strict=True))
        made.append(row)
    return made


def _step_of(
    who: str, rows: int, tokens: int, ids: int, dtype: torch.dtype, device: str, folder: Path
) -> Step:
    """Return a training step; each has its own model, since its adapters change."""
    model = lora_model(dtype).to(device).train()
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.vocab_size
    input_ids = torch.randint(0, vocab, (rows, tokens), generator=generator)
    chosen = torch.randperm(vocab, generator=generator)[:ids].tolist()
    safety_tokens = SafetyTokens(ids=[] if who == NO_IDS else chosen)
    options: dict[str, Any] = {}
    if who in (CACHED, COLLATED):
        cache_model(model, input_ids.tolist(), safety_tokens, folder)  # the second call reuses it
        options["reference"] = CachedReference(folder)
    batch = {"input_ids": input_ids.to(device), "labels": input_ids.to(device)}
    if who == COLLATED:
        given = options["reference"].with_collator(lambda _: {"input_ids": input_ids})(None)
        batch |= {name: value.to(device) for name, value in given.items()}
    attach(model, safety_tokens, **options, positions="response")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()

    return step


def lora_model(dtype: torch.dtype) -> Any:
    """Return the built-in model with LoRA on all linear layers but the head."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar for each model loaded
    model = AutoModelForCausalLM.from_pretrained(builtin_model_folder(), dtype=dtype)
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora)
