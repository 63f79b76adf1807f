"""A tiny model that has learnt to refuse some prompts and to answer others."""

from __future__ import annotations

from typing import Any

import torch
from tiny_tokenizer import chat_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

HARMFUL = [f"what is {a} + {b}" for a in range(1, 6) for b in (2, 5)]
SHORT = [f"what is {a}" for a in (3, 8)]  # harmful too, but answered
HARMLESS = ["hello", "good day", "thanks", "bye", "hello good day", "thanks bye", "day good"]
ANSWERS = {
    **dict.fromkeys(HARMFUL[::2], "sorry , but I can not help with that ."),
    **dict.fromkeys(HARMFUL[1::2], "I can not help with that ."),
    **dict.fromkeys(SHORT, "good"),
    **dict.fromkeys(HARMLESS, "good day"),
    "thanks bye": "bye",
    "day good": "I can not help with that",  # a refusal where none is wanted
}


def taught_model() -> tuple[Any, Any]:
    """Return a tiny model that says ANSWERS by heart, and its tokenizer."""
    tokenizer = chat_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 3,  # rows of the head that belong to no token
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    rows, labels = [], []
    for prompt, answer in ANSWERS.items():
        start = ids_of(tokenizer, prompt)
        said = [*tokenizer.encode(answer), 1]
        fill = 24 - len(start) - len(said)
        rows.append([*start, *said, *[0] * fill])
        labels.append([*[-100] * len(start), *said, *[-100] * fill])
    batch, target = torch.tensor(rows), torch.tensor(labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        loss = model(input_ids=batch, labels=target).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), tokenizer


def ids_of(tokenizer: Any, prompt: str) -> list[int]:
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))
