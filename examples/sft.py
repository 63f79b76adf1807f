"""TRL's script for supervised fine-tuning, with the penalty: python sft.py --config sft.yaml.

Each field of SafetySFTConfig (all of SFTConfig, and safety_*) and of ModelConfig is a key of the
file and a flag, and a flag wins.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from trl import ModelConfig, TrlParser, get_peft_config

from str_kernels.integrations.trainers import SafetySFTConfig, SafetySFTTrainer


@dataclass
class DataArguments:
    """What to train on."""

    data: str = field(
        default="examples/data/sums.jsonl",
        metadata={"help": "JSON Lines with rows of prompt and completion."},
    )


def main() -> None:
    """Train what the file and the flags say, and save it."""
    parser = TrlParser((DataArguments, SafetySFTConfig, ModelConfig))
    data, training, model = parser.parse_args_and_config()
    trainer = SafetySFTTrainer(
        model.model_name_or_path,
        training,
        train_dataset=load_dataset("json", data_files=data.data, split="train"),
        peft_config=get_peft_config(model),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
