"""The safety loss in Hugging Face models and trainers, and the commands built on it."""
