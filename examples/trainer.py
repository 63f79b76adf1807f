"""transformers' Trainer: SafetyTrainer stands in for it, with the safety tokens as one argument."""

import argparse
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    TrainingArguments,
)

from str_kernels import SafetyTokens
from str_kernels.integrations.chat import encode_rows, read_examples
from str_kernels.integrations.trainers import SafetyTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data" / "sums.jsonl")
parser.add_argument("--output", default="run")
parser.add_argument("--steps", type=int, default=10)


def main() -> None:
    """Train a LoRA and save it."""
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    training = TrainingArguments(
        output_dir=args.output,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=5e-4,
        logging_steps=5,
    )
    trainer = SafetyTrainer(
        model,
        training,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=encode_rows(tokenizer, read_examples(args.data), max_length=1024).rows,
        processing_class=tokenizer,
        safety_tokens=SafetyTokens.from_templates(tokenizer),
    )
    trainer.train()  # logs safety/ce, safety/anchor_penalty and safety/max_drift beside the loss
    trainer.save_model()


if __name__ == "__main__":
    main()
