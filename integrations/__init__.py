"""The loss in Hugging Face models and trainers, and the commands around it."""
