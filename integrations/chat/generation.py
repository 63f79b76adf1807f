"""Greedy answers to many prompts at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...evals import has_marks, opened_thought, without_thought
from ..models import base_of, contiguous_head_input, evaluation_mode
from .rendering import render_prompts

ENOUGH_TOKENS = 24  # an answer this long shows a refusal even if it opens politely


class Answer(NamedTuple):
    """A model's answer.

    Attributes:
        text: without special tokens and without the thought before it; if there is only a thought,
            the thought with its mark.
        unfinished: the answer was cut inside a thought, or so soon after it that a refusal may
            still have followed.
    """

    text: str
    unfinished: bool


def answer_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Answer each prompt as one chat turn, greedily.

    Args:
        model: as in `answer_ids`.
        tokenizer: as in `answer_ids`.
        prompts: the questions.
        max_new_tokens: maximum length of an answer, tokens.
        batch_size: prompts at a time.
        progress: called with the number of prompts just answered.

    Returns:
        One answer per prompt, without special tokens and without the thought before it. An answer
        that was cut inside its thought is the thought with its mark.
    """
    return answer_texts(
        model,
        tokenizer,
        render_prompts(tokenizer, prompts),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )


def answer_texts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Answer prompts that are already rendered; otherwise as `answer_prompts`."""
    options: Any = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    return [a.text for a in answers_to(model, tokenizer, texts, progress=progress, **options)]


def answers_to(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Answer as `answer_texts`, and tell which answers are too short to judge."""
    options: Any = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    ids = continuations(model, tokenizer, texts, progress=progress, **options)
    return [
        _read(tokenizer, text, answer, cut=len(answer) == max_new_tokens)
        for text, answer in zip(texts, ids, strict=True)
    ]


def first_tokens(tokenizer: Any, text: str, count: int) -> str:
    """Return the first `count` tokens of a text, as text."""
    ids = tokenizer.encode(text, add_special_tokens=False)[:count]
    return str(tokenizer.decode(ids))


def _read(tokenizer: Any, prompt: str, ids: list[int], *, cut: bool) -> Answer:
    """Return an answer as text, without the thought before it unless there is only a thought.

    Marks of thoughts may be special tokens, so they are found before special tokens are removed.
    """
    whole = opened_thought(prompt) + str(tokenizer.decode(ids, skip_special_tokens=False))
    if not has_marks(whole):
        return Answer(str(tokenizer.decode(ids, skip_special_tokens=True)), unfinished=False)
    answer = without_thought(whole)
    if answer is None:
        return Answer(whole, unfinished=True)
    told = len(tokenizer.encode(answer, add_special_tokens=False))
    unfinished = cut and told < ENOUGH_TOKENS and len(answer) < len(whole)
    for token in tokenizer.all_special_tokens:
        answer = answer.replace(token, "")
    return Answer(answer, unfinished)


def answer_ids(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Answer each prompt as one chat turn, greedily, and return token ids.

    Prompts are batched by length to save padding; the answers are returned in order.

    Args:
        model: a causal LM; its training mode is restored.
        tokenizer: with a chat template.
        prompts: the questions.
        max_new_tokens: maximum length of an answer, tokens.
        batch_size: prompts at a time.
        progress: called with the number of prompts just answered.

    Returns:
        The ids of each answer, up to the token that ends it, which is left out.
    """
    texts = render_prompts(tokenizer, prompts)
    options: Any = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    return continuations(model, tokenizer, texts, progress=progress, **options)


def end_ids(model: Any, tokenizer: Any) -> set[int]:
    """Return the ids that end an answer, from the model's generation config and the tokenizer.

    Both, since the config of a base model with an instruct tokenizer lacks the end of a turn.
    """
    ends = model.generation_config.eos_token_id
    listed = ends if isinstance(ends, (list, tuple)) else [ends]
    return {end for end in (*listed, tokenizer.eos_token_id) if end is not None}


def continue_greedily(
    model: Any, tokenizer: Any, texts: Sequence[str], max_new_tokens: int
) -> tuple[Any, Tensor]:
    """Continue one batch of rendered texts.

    Args:
        model: a causal LM; its training mode is restored.
        tokenizer: the model's.
        texts: with all the special tokens they need.
        max_new_tokens: maximum length of a continuation, tokens.

    Returns:
        The model's batch, padded on the left, and the new ids (B, at most max_new_tokens), padded
        on the right.
    """
    batch = tokenizer(
        list(texts),
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=False,
    ).to(model.device)
    head_is_fast = contiguous_head_input(base_of(model))
    with torch.inference_mode(), evaluation_mode(model), head_is_fast:
        generated = model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(end_ids(model, tokenizer)) or None,
        )
    return batch, generated[:, batch["input_ids"].shape[1] :]


def continuations(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Continue texts, batched by length; return ids without the token that ends an answer."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    answers: list[list[int]] = [[] for _ in texts]
    ends = end_ids(model, tokenizer)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        _, new = continue_greedily(model, tokenizer, [texts[i] for i in part], max_new_tokens)
        for i, ids in zip(part, new.tolist(), strict=True):
            end = next((at for at, token in enumerate(ids) if token in ends), len(ids))
            answers[i] = ids[:end]
        if progress is not None:
            progress(len(part))
    return answers
