"""Fine-tune a chat model on a file of rows, with TRL, and keep its refusals."""

from datasets import load_dataset
from peft import LoraConfig

from str_kernels.integrations.trainers import SafetySFTConfig, SafetySFTTrainer

trainer = SafetySFTTrainer(
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    SafetySFTConfig(output_dir="run", max_steps=10, learning_rate=5e-4, logging_steps=5),
    train_dataset=load_dataset("json", data_files="examples/data/sums.jsonl", split="train"),
    peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
)
trainer.train()
trainer.save_model()
