"""Run a training step of the built-in model in a separate process, for its peak memory.

`python -m bench.memory.plan_child '{"who": "ours", "tokens": 512, ...}'` prints the bytes that the
model, its adapters and the optimizer hold, and those that a step takes above them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.utils import logging

from str_kernels import AnchorPrompts, SafetyTokens, attach
from str_kernels.integrations.loading.builtin_model import builtin_model_folder
from str_kernels.integrations.plan.losses import loss_by_hand
from str_kernels.integrations.plan.step_memory import checkpoint_layers
from str_kernels.loss_memory import measure_peak

_STATUS = Path("/proc/self/status")


def main(job: dict[str, Any]) -> dict[str, int]:
    """Measure one step; the job has `who`, batch, tokens, rank, dtype, attention and flags."""
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    logging.disable_progress_bar()
    folder = builtin_model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held = SafetyTokens.from_templates(tokenizer), AnchorPrompts.default(tokenizer)
    _warm_up(job, *held)  # libraries touch their code at first use
    before = _resident()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, job["dtype"]), attn_implementation=job["attention"]
    )
    step = make_step(model, job, *held)
    step(job["tokens"])  # the optimizer's state, and what libraries keep for these shapes
    between = _resident() - before
    peak = measure_peak(lambda: step(job["tokens"]))
    if peak is None:
        raise RuntimeError("/proc/self/clear_refs is missing: memory is measured on Linux only")
    return {"held": between, "step": peak}


def make_step(
    model: Any, job: dict[str, Any], safety_tokens: SafetyTokens, anchors: AnchorPrompts
) -> Callable[[int], None]:
    """Return a training step of so many tokens, as Trainer makes it."""
    lora = LoraConfig(r=job["rank"], target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    inner = model.get_base_model()
    model.train()
    inner.config.use_cache = False  # as Trainer sets it
    if job["checkpointing"]:
        checkpoint_layers(model)
    if job["who"] == "ours":
        if job["reference"] == "none":
            attach(model, safety_tokens, anchors=anchors)
        else:
            attach(model, safety_tokens, positions="response")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)  # Trainer's default
    vocab = inner.config.vocab_size
    generator = torch.Generator().manual_seed(0)

    def step(tokens: int) -> None:
        rows = torch.randint(0, vocab, (job["batch"], tokens), generator=generator)
        batch = {"input_ids": rows, "labels": rows}
        if job["padding"]:
            mask = torch.ones_like(rows)
            mask[0, -1] = 0
            batch["attention_mask"] = mask
        if job["who"] == "by_hand":
            labels = batch.pop("labels")
            with torch.no_grad(), model.disable_adapter():
                ref = model(**batch).logits.float()
            loss_by_hand(model(**batch).logits, labels, safety_tokens.ids, ref).backward()
            del ref
        else:
            model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _warm_up(job: dict[str, Any], *held: Any) -> None:
    config = LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, attn_implementation=job["attention"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, job["dtype"]))
    make_step(model, job, *held)(16)


def _resident() -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no VmRSS")


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
