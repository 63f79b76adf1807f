"""Safety tokens from how the aligned model begins its answers, whether or not they refuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...op import accumulation_dtype
from ...tokens import SafetyTokens
from ..chat import render_answer_starts
from ..models import evaluation_mode


def from_openings(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    beside: SafetyTokens | None = None,
    count: int | None = None,
    batch_size: int = 16,
    answer_starts: Sequence[str] | None = None,
) -> SafetyTokens:
    """Choose the tokens that the model's answers most likely begin with, and add them to others.

    With p_i(v) the probability of token v where the answer to prompt i begins,

        score(v) = mean over i of p_i(v)

    The `count` best tokens that are not in `beside` are chosen. With the tokens of `beside` alone,
    a penalty of kind coarse_kl sees only whether an answer begins as a refusal or in another way.
    With these tokens it also tells the other ways apart.

    Args:
        model: the aligned causal LM; its training mode is restored.
        tokenizer: the model's, with a chat template and a padding token.
        prompts: harmful and harmless prompts, strings.
        beside: other tokens to include, such as those of refusal templates.
        count: number of tokens to choose, >= 1; None means as many as in `beside`.
        batch_size: prompts at a time, >= 1.
        answer_starts: the prompts already rendered up to where an answer begins, for chat templates
            that need options for this.

    Returns:
        SafetyTokens with those of `beside` first, without weights. Their scores are those above.

    Raises:
        TypeError: prompts is one string.
        ValueError: a number is out of its range, or there is no prompt.
    """
    if isinstance(prompts, str):
        raise TypeError(f"`prompts` must be a sequence of strings; got the string {prompts!r}")
    if not prompts:
        raise ValueError("`prompts` must hold at least one prompt; got none")
    count = count if count is not None or beside is None else len(beside)
    if count is None or count < 1:
        raise ValueError(f"`count` must be >= 1, and given where `beside` is None; got {count}")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be >= 1; got {batch_size}")
    starts = list(answer_starts or render_answer_starts(tokenizer, prompts))
    total: Tensor | None = None
    for first in range(0, len(starts), batch_size):
        found = _next_logits(model, tokenizer, starts[first : first + batch_size])
        part = found.to(accumulation_dtype(found.dtype)).softmax(dim=-1).sum(dim=0)
        total = part if total is None else total + part
    score = torch.zeros(0) if total is None else total / len(starts)
    free = score.clone()
    kept = [] if beside is None else beside.ids.tolist()
    free[kept] = -1.0
    best = free.topk(min(count, len(free) - len(kept))).indices.tolist()
    ids = [*kept, *best]
    of = "" if beside is None else f"{beside.source}; and "
    return SafetyTokens.from_ids(
        tokenizer,
        ids,
        source=f"{of}the {len(best)} likeliest other openings of answers to {len(prompts)} prompts",
        scores=[float(score[token]) for token in ids],
    )


def _next_logits(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:  # (B, V)
    """Return the logits of the token after each text."""
    batch = tokenizer(
        list(texts),
        return_tensors="pt",
        padding=True,
        padding_side="right",  # the same positions as without padding, in every model
        add_special_tokens=False,
    ).to(model.device)
    with torch.inference_mode(), evaluation_mode(model):
        logits: Tensor = model(**batch).logits
    last = batch["attention_mask"].sum(dim=1) - 1
    return logits[torch.arange(len(last), device=last.device), last]
