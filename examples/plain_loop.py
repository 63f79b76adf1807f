"""A training loop of your own; the lines marked (1) to (3) are all that the penalty adds."""

import argparse
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from str_kernels import SafetyTokens, attach  # (1)
from str_kernels.integrations.chat import encode_rows, read_examples

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data" / "sums.jsonl")
parser.add_argument("--output", default="run")
parser.add_argument("--steps", type=int, default=10)


def main() -> None:
    """Train a LoRA and save it."""
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model).to(device)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))

    encoded = encode_rows(tokenizer, read_examples(args.data), max_length=1024)
    rows = Dataset.from_list(encoded.rows)
    collator = DataCollatorForSeq2Seq(tokenizer)
    loader = DataLoader(rows, batch_size=8, shuffle=True, collate_fn=collator)
    batches = islice(chain.from_iterable(repeat(loader)), args.steps)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-4)

    handle = attach(model, SafetyTokens.from_templates(tokenizer), tokenizer=tokenizer)  # (2)
    model.train()  # from_pretrained leaves it in eval mode, in which there is no penalty
    for step, batch in enumerate(batches, start=1):
        loss = model(**batch.to(device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0 and handle.last_anchors is not None:
            penalty = handle.last_anchors.penalty
            print(f"step {step:3}  loss {loss.item():.4f}  penalty at anchors {penalty.item():.4f}")
    handle.remove()  # (3)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
