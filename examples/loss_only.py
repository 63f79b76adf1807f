"""The loss function alone, in place of F.cross_entropy, in a loop that makes its own loss.

This is the paper's form: each answer's tokens are held to what the model said before training. The
reference is the same weights with the adapters off, so there is no second model.
"""

import argparse
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from str_kernels import SafetyPenalty, SafetyTokens, project, safety_linear_cross_entropy
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
    base = AutoModelForCausalLM.from_pretrained(args.model).to(device)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))

    encoded = encode_rows(tokenizer, read_examples(args.data), max_length=1024)
    rows = Dataset.from_list(encoded.rows)
    collator = DataCollatorForSeq2Seq(tokenizer)
    loader = DataLoader(rows, batch_size=8, shuffle=True, collate_fn=collator)
    batches = islice(chain.from_iterable(repeat(loader)), args.steps)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-4)

    safety_ids = SafetyTokens.from_templates(tokenizer).ids.to(device)
    backbone, head, penalty = base.model, base.lm_head.weight, SafetyPenalty(weight=0.1)
    for step, batch in enumerate(batches, start=1):
        labels = batch.pop("labels").to(device)
        inputs = batch.to(device)
        kept = labels[:, 1:] != -100  # position t predicts token t + 1
        with torch.no_grad(), model.disable_adapter():
            ref_hidden = backbone(**inputs).last_hidden_state[:, :-1][kept]
        hidden = backbone(**inputs).last_hidden_state[:, :-1][kept]
        # before: loss = F.cross_entropy(hidden @ head.T, labels[:, 1:][kept])
        ref = project(ref_hidden, head, safety_ids)
        terms = safety_linear_cross_entropy(
            hidden, head, labels[:, 1:][kept], safety_ids, ref, penalty=penalty
        )
        terms.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            print(f"step {step:3}  ce {terms.ce.item():.4f}  penalty {terms.penalty.item():.4f}")
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
