"""Conversations: read from files, rendered with the chat template, answered by a model."""

from __future__ import annotations

from .generation import (
    Answer,
    answer_ids,
    answer_prompts,
    answer_texts,
    answers_to,
    continuations,
    continue_greedily,
    end_ids,
    first_tokens,
)
from .rendering import render, render_answer_starts, render_prompts
from .rows import EncodedRows, Example, encode_examples, encode_prompt, encode_rows, read_examples

__all__ = [
    "Answer",
    "EncodedRows",
    "Example",
    "answer_ids",
    "answer_prompts",
    "answer_texts",
    "answers_to",
    "continuations",
    "continue_greedily",
    "encode_examples",
    "encode_prompt",
    "encode_rows",
    "end_ids",
    "first_tokens",
    "read_examples",
    "render",
    "render_answer_starts",
    "render_prompts",
]
