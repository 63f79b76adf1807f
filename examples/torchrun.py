"""A loop of your own on several ranks: torchrun --nproc-per-node 2 torchrun.py [--shard].

DDP, or FSDP2 with --shard; nccl on GPUs, gloo on CPUs. Attach first, then wrap.
"""

import argparse
from itertools import chain, islice, repeat
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from str_kernels import SafetyTokens, attach
from str_kernels.integrations.chat import encode_rows, read_examples

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data" / "sums.jsonl")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--batch-size", type=int, default=4, help="rows of one rank in a step")
parser.add_argument("--shard", action="store_true", help="FSDP2 instead of DDP")


def main() -> None:
    """Train a LoRA on all ranks."""
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    if device.type != "cpu":
        torch.accelerator.set_device_index(dist.get_node_local_rank())
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model).to(device)
    peft_model = get_peft_model(base, LoraConfig(target_modules="all-linear")).train()
    attach(peft_model, SafetyTokens.from_templates(tokenizer), tokenizer=tokenizer)
    if args.shard:
        for layer in base.model.layers:
            fully_shard(layer)
        model = fully_shard(peft_model)  # the head stays with the root: the loss reads it there
    else:
        model = DistributedDataParallel(peft_model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-4)

    encoded = encode_rows(tokenizer, read_examples(args.data), max_length=1024)
    rows = Dataset.from_list(encoded.rows)
    sampler: DistributedSampler[Dataset] = DistributedSampler(rows, shuffle=False)
    collator = DataCollatorForSeq2Seq(tokenizer)
    loader = DataLoader(rows, args.batch_size, sampler=sampler, collate_fn=collator)
    for step, batch in enumerate(islice(chain.from_iterable(repeat(loader)), args.steps), start=1):
        labels = (batch["labels"][:, 1:] != -100).sum().to(device)
        dist.all_reduce(labels)  # of all ranks, so that each label counts the same
        loss = model(**batch.to(device), num_items_in_batch=labels).loss
        (loss * dist.get_world_size()).backward()  # gradients are averaged; this makes them a sum
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            print(f"step {step:3}  loss {total.item():.5f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group()  # torchrun's environment says who is there
    main()
    # Only now that DDP is gone: a group that dies with it can wait for its own threads for ever.
    dist.destroy_process_group()
