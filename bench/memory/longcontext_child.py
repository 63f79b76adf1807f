"""Run one training step of long rows in a separate process, for its peak memory and time.

`python -m bench.memory.longcontext_child` with `{"who": "own", "tokens": 2048, ...}` prints, as
JSON, the bytes above the loaded model and the seconds; or that memory ran out.
"""

from __future__ import annotations

import ctypes
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from str_kernels import AnchorPrompts, SafetyTokens, attach
from str_kernels.integrations.loading.builtin_model import builtin_model_folder
from str_kernels.integrations.plan.losses import loss_by_hand
from str_kernels.integrations.plan.step_memory import checkpoint_layers
from str_kernels.integrations.reference_cache.reading import cache_model
from str_kernels.loss_memory import measure_peak
from str_kernels.op.chunks import is_out_of_memory
from str_kernels.reference_cache.reader import CachedReference

OWN, BY_HAND, TRL = "own loss", "naive STR", "TRL's chunked loss"
LIVE, CACHED, ANCHORS = "ours, live", "ours, cached", "ours, anchors only"
WAYS = (OWN, BY_HAND, TRL, LIVE, CACHED, ANCHORS)
_WARM_UP = 16  # tokens: libraries load their code, and the optimizer makes its state


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Measure one step; the job has `who`, tokens, rank, threads, a folder and a limit in bytes."""
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    logging.disable_progress_bar()
    folder = builtin_model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, model.config.vocab_size, (1, job["tokens"]), generator=generator)
    step = make_step(model, job["who"], rows, tokenizer, job["rank"], Path(job["folder"]))
    if job.get("builds_cache"):
        return {"status": "built"}
    step(rows[:, :_WARM_UP])  # also reads the weights, which are only memory-mapped until then
    ctypes.CDLL(None).malloc_trim(0)  # else memory that this freed would not count again
    if job["limit"]:
        resource.setrlimit(resource.RLIMIT_DATA, (job["limit"], job["limit"]))
    seconds = 0.0

    def timed() -> None:
        nonlocal seconds
        start = time.perf_counter()
        step(rows)
        seconds = time.perf_counter() - start

    try:
        peak = measure_peak(timed)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {"status": "out of memory"}
    if peak is None:
        raise RuntimeError("/proc/self/clear_refs is missing: memory is measured on Linux only")
    return {"status": "measured", "peak_bytes": peak, "seconds": seconds}


def make_step(
    model: Any, who: str, rows: torch.Tensor, tokenizer: Any, rank: int, folder: Path
) -> Callable[[torch.Tensor], None]:
    """Return a LoRA step with gradient checkpointing, as Trainer makes it; see `make_loss`."""
    trained, loss_of = make_loss(model, who, rows, tokenizer, rank, folder)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)  # Trainer's default

    def step(input_ids: torch.Tensor) -> None:
        loss_of(input_ids).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_loss(
    model: Any, who: str, rows: torch.Tensor, tokenizer: Any, rank: int, folder: Path
) -> tuple[list[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """Return the trained parameters, and the function that computes one way's loss of a row.

    Args:
        model: without adapters.
        who: a name in WAYS.
        rows: (1, T), for which a cache is made.
        tokenizer: of the model.
        rank: of the adapters.
        folder: where the caches are, one for each length.
    """
    if who == TRL:
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    lora = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    model.config.use_cache = False  # as Trainer sets it
    checkpoint_layers(model)
    safety_tokens = SafetyTokens.from_templates(tokenizer)
    if who == ANCHORS:
        attach(model, safety_tokens, anchors=AnchorPrompts.default(tokenizer))
    elif who == LIVE:
        attach(model, safety_tokens, positions="response")
    elif who == CACHED:
        path = folder / f"cache-{rows.shape[1]}"
        if not path.exists():
            cache_model(model, [rows[0].tolist(), rows[0, :_WARM_UP].tolist()], safety_tokens, path)
        attach(model, safety_tokens, positions="response", reference=CachedReference(path))
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss_of(input_ids: torch.Tensor) -> torch.Tensor:
        if who == BY_HAND:
            with torch.no_grad(), model.disable_adapter():
                ref = model(input_ids=input_ids).logits.float()
            logits = model(input_ids=input_ids).logits
            return loss_by_hand(logits, input_ids, safety_tokens.ids, ref)
        if who == TRL:
            output = model(input_ids=input_ids, labels=input_ids, fused_lm_head=True)
            return -output.log_probs.sum() / output.label_mask.sum()
        loss: torch.Tensor = model(input_ids=input_ids, labels=input_ids).loss
        return loss

    return trained, loss_of


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
