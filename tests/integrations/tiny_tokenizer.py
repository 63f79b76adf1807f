"""A word-level tokenizer with a chat template, made on the spot, and a model that fits it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_WORDS = (
    "<pad> <end> <user> <assistant> <unk> hello good day thanks bye sorry , but I can not help "
    "with that . what is 1 2 3 4 5 6 7 8 9 + - ="
).split()
_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def chat_tokenizer() -> Any:
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def byte_tokenizer(template: str) -> Any:
    """Make a tokenizer of bytes and of the special tokens that a chat template writes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        clean_up_tokenization_spaces=False,
        chat_template=template,
    )
    special = re.findall(r"<[|\uff5c][\w\u2581]+[|\uff5c]>|<(?:start|end)_of_\w+>", template)
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(special))})
    return tokenizer


def save_tiny_model(folder: Path, seed: int, **sizes: int) -> Path:
    """Write a model and its tokenizer as a folder that from_pretrained reads."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(_WORDS),
        hidden_size=sizes.get("hidden_size", 32),
        intermediate_size=sizes.get("intermediate_size", 48),
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder
