"""Long rows in little memory: what `str-kernels finetune --long-context` sets, in a script."""

import argparse
import resource
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from str_kernels.integrations.chat import encode_rows, read_examples
from str_kernels.integrations.trainers import SafetySFTConfig, SafetySFTTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data/long_chats.jsonl")
parser.add_argument("--output", default="run")
parser.add_argument("--steps", type=int, default=2)
parser.add_argument("--max-length", type=int, default=8192)


def main() -> None:
    """Train a LoRA, save it and print the peak of memory."""
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    # every answer of a conversation has labels, whether or not TRL knows the chat template
    encoded = encode_rows(tokenizer, read_examples(args.data), args.max_length)
    print("tokens of the longest row:", max(len(row["input_ids"]) for row in encoded.rows))
    training = SafetySFTConfig(
        output_dir=args.output,
        gradient_checkpointing=True,
        per_device_train_batch_size=1,  # rows of several lengths need a mask, of their square
        gradient_accumulation_steps=4,
        max_length=None,  # they are cut already
        safety_chunk_bytes=16 * 2**20,  # of logits at a time; all of a row are never there
        max_steps=args.steps,
        learning_rate=5e-4,
        logging_steps=1,
    )
    trainer = SafetySFTTrainer(
        AutoModelForCausalLM.from_pretrained(args.model),
        training,
        train_dataset=Dataset.from_list(encoded.rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    if torch.accelerator.is_available():
        peak = torch.accelerator.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory: {peak / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
