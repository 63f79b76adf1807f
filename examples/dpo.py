"""TRL's DPOTrainer with the penalty added to its loss, at the tokens of both answers.

For LoRA on one device: the reference of DPO, the model with its adapters off, is that of the
penalty too. docs/own_losses.md has the mathematics, KTO and distillation.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from str_kernels import SafetyLoss, SafetyPenalty, SafetyTokens, project, safety_cross_entropy

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data/preferences.jsonl")
parser.add_argument("--output", default="run")
parser.add_argument("--steps", type=int, default=10)


class SafetyDPOTrainer(DPOTrainer):
    """DPOTrainer that holds the safety tokens' logits where the answers' tokens are predicted."""

    def __init__(self, *args: Any, safety_tokens: SafetyTokens, weight: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.safety_ids = safety_tokens.ids_on(self.accelerator.device)
        self.penalty = safety_tokens.weigh(SafetyPenalty(weight))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return TRL's loss plus the penalty."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        passes: list[Tensor] = []  # hidden states: the policy's, then the reference's
        backbone = self.model.get_base_model().model
        with backbone.register_forward_hook(lambda *call: passes.append(call[-1][0][:, :-1])):
            loss = super().compute_loss(model, inputs)
        rows = inputs["completion_mask"][:, 1:] != 0
        held = self.safety_terms(*(hidden[rows] for hidden in passes))
        self._metrics["train"]["safety/penalty"].append(held.penalty.item())
        return loss + held.loss

    def safety_terms(self, hidden: Tensor, ref_hidden: Tensor) -> SafetyLoss:
        """Return the penalty at rows of hidden states, (n, D)."""
        head = self.model.get_base_model().lm_head.weight
        logits, ref = (project(h, head, self.safety_ids) for h in (hidden, ref_hidden))  # (n, K)
        places = torch.arange(len(self.safety_ids), device=logits.device)  # K logits, all held
        no_target = torch.full_like(logits[:, 0], -100, dtype=torch.int64)
        held = torch.ones_like(logits[:, 0])
        return safety_cross_entropy(
            logits, no_target, places, ref, penalty=self.penalty, safety_row_weight=held
        )


def main() -> None:
    """Train a LoRA on preferences and save it."""
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    trainer = SafetyDPOTrainer(
        args.model,
        args=DPOConfig(
            output_dir=args.output,
            max_steps=args.steps,
            per_device_train_batch_size=4,
            learning_rate=5e-4,
            logging_steps=5,
            bf16=torch.accelerator.is_available(),  # TRL's default, which a CPU refuses
        ),
        train_dataset=load_dataset("json", data_files=str(args.data), split="train"),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
        safety_tokens=SafetyTokens.from_templates(tokenizer),
        weight=0.1,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
