"""QLoRA: the frozen base in 4 bits by bitsandbytes, on a GPU or a CPU. It is the reference too."""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from str_kernels.integrations.trainers import SafetySFTConfig, SafetySFTTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data" / "sums.jsonl")
parser.add_argument("--output", default="run")
parser.add_argument("--steps", type=int, default=10)


def main() -> None:
    """Train a LoRA on a 4-bit base and save it."""
    args = parser.parse_args()
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=four_bits)
    trainer = SafetySFTTrainer(
        model,
        SafetySFTConfig(
            output_dir=args.output,
            max_steps=args.steps,
            learning_rate=5e-4,
            logging_steps=5,
        ),
        train_dataset=load_dataset("json", data_files=str(args.data), split="train"),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
