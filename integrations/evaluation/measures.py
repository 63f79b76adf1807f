"""Measures of a model other than refusals: right answers, perplexity, drift along an answer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq

from ...evals import DriftStatistics, drift_statistics
from ...tokens import SafetyTokens
from ..chat import Example, continue_greedily, encode_prompt, end_ids, render, render_prompts
from ..models import (
    LossPath,
    adapters_off,
    check_adapters,
    evaluation_mode,
    is_peft_model,
    is_prompt_learning,
    make_path,
    read_safety_logits,
)

_ROWS = 32  # rows per forward
EXACT_MATCH_RULE = (
    "equal after runs of white space are made one blank, blanks at both ends removed and one final "
    "period dropped; upper and lower case are told apart"
)


class Perplexity(NamedTuple):
    """How well a model predicts a text.

    Args:
        perplexity: exp(nats).
        nats: mean negative log-likelihood of a predicted token.
        tokens: number of tokens predicted: all but the first.
    """

    perplexity: float
    nats: float
    tokens: int


def is_exact_match(answer: str, expected: str) -> bool:
    r"""Tell whether an answer is the expected one, by EXACT_MATCH_RULE.

    Examples:
        >>> is_exact_match("The answer  is 7\n", "The answer is 7.")
        True
        >>> is_exact_match("the answer is 7", "The answer is 7."), is_exact_match("7..", "7.")
        (False, False)
    """
    return _plain(answer) == _plain(expected)


def question_and_answer(tokenizer: Any, example: Example) -> tuple[str, str]:
    """Return the rendered question of a task row, and the expected answer.

    Args:
        tokenizer: with a chat template if the row has messages.
        example: a row. In a conversation the last assistant turn is the expected answer, and the
            turns before it are the question.

    Returns:
        The question with all special tokens, and the answer as it is in the row.
    """
    if example.messages is None:
        # decoded with the special tokens in front, since it is encoded without adding them later
        start = tokenizer.decode(encode_prompt(tokenizer, example.prompt)) if example.prompt else ""
        return start, example.completion
    last = max(i for i, turn in enumerate(example.messages) if turn["role"] == "assistant")
    before = example.messages[:last]
    question = render(tokenizer, before, add_generation_prompt=True, **example.options)
    return question, example.messages[last]["content"]


def held_out_loss(model: Any, tokenizer: Any, rows: Sequence[dict[str, list[int]]]) -> float:
    """Return the mean cross-entropy of all labels in `rows`, nats per token."""
    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    total = count = 0.0
    with torch.inference_mode(), evaluation_mode(model):
        for start in range(0, len(rows), _ROWS):
            batch = collate(list(rows[start : start + _ROWS])).to(model.device)
            labels = int((batch["labels"][:, 1:] != -100).sum())
            total += float(model(**batch).loss) * labels
            count += labels
    return total / max(count, 1.0)


def text_perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    max_length: int = 512,
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Measure the perplexity of a plain text, predicting each token once.

    Let x_0 .. x_{n-1} be the tokens of the text, read in windows of L = max_length tokens that
    start at multiples of the stride s, and b_i the start of the first window that holds token i:

        nats       = -1 / (n - 1) * sum over 0 < i < n of log p(x_i | x_{b_i} .. x_{i-1})
        perplexity = exp(nats)

    Args:
        model: a causal LM.
        tokenizer: the model's; its special tokens are added as for any text.
        text: of two tokens or more.
        max_length: L, >= 2.
        stride: s, in [1, L - 1]; None means half of L. A smaller stride is slower and gives each
            token more context: at least L - s tokens beyond the first window.
        progress: called with the number of windows done and in total.

    Returns:
        Perplexity. It depends on the tokenizer, so compare models of one tokenizer only.

    Raises:
        ValueError: max_length or stride is out of its range, or the text is too short.
    """
    stride = max(1, max_length // 2) if stride is None else stride
    if max_length < 2:
        raise ValueError(f"`max_length` must be >= 2; got {max_length}")
    if not 1 <= stride < max_length:
        raise ValueError(f"`stride` must be in [1, {max_length - 1}]; got {stride}")
    # verbose=False: no warning for a long text, which the windows are for
    ids = torch.tensor(tokenizer.encode(text, verbose=False))
    if len(ids) < 2:
        raise ValueError(f"`text` must have at least 2 tokens; got {len(ids)}")
    starts = range(0, max(1, len(ids) - max_length + stride), stride)
    total, scored = 0.0, 1  # nothing predicts the first token
    with torch.inference_mode(), evaluation_mode(model):
        for number, start in enumerate(starts, start=1):
            window = ids[start : start + max_length].to(model.device)
            logits = model(input_ids=window[None], use_cache=False).logits[0]
            rows = logits[scored - start - 1 : len(window) - 1].float()
            loss = nn.functional.cross_entropy(rows, window[scored - start :], reduction="none")
            total += loss.double().sum().item()
            scored = start + len(window)
            if progress is not None:
                progress(number, len(starts))
    nats = total / (len(ids) - 1)
    return Perplexity(math.exp(min(nats, 700.0)), nats, len(ids) - 1)


def drift_by_position(
    model: Any,
    tokenizer: Any,
    tokens: SafetyTokens,
    prompts: Sequence[str],
    positions: int,
    *,
    ref_model: Any | None = None,
) -> list[DriftStatistics]:
    """Measure how far the safety logits moved at each of the first positions of an answer.

    The reference answers each prompt greedily, and both models then read the prompt with that
    answer. At position j (1 is where the answer begins) both predict the answer's token j from the
    prompt and its tokens 1 .. j - 1; the drift is the difference of the safety logits there.

    Args:
        model: a PeftModel, whose reference is itself with the adapters off, or any causal LM.
        tokenizer: of both models, with a chat template.
        tokens: the safety tokens whose logits are compared.
        prompts: one batch of questions.
        positions: m, >= 1, tokens of the reference's answer.
        ref_model: the reference; None for a PeftModel that is its own reference.

    Returns:
        DriftStatistics of each position, over prompts and ids; `rows` is the number of prompts
        whose answer has this position. Positions that no answer has are left out.

    Raises:
        ValueError: there is no `ref_model` and the model cannot be its own reference, or the model
            has virtual tokens; the message says why.
    """
    if positions < 1:
        raise ValueError(f"`positions` must be >= 1; got {positions}")
    if is_prompt_learning(model):
        raise ValueError("`model` must not have virtual tokens: its positions are not the text's")
    if ref_model is None:
        if not is_peft_model(model):
            raise ValueError("`ref_model` must be given for a model without adapters")
        check_adapters(model)
    reference = model if ref_model is None else ref_model
    off = contextlib.nullcontext() if ref_model is not None else adapters_off(model)
    with off:
        batch, answer = continue_greedily(
            reference, tokenizer, render_prompts(tokenizer, prompts), positions
        )
    asked = batch["input_ids"].shape[1]
    given = _is_given(answer, end_ids(reference, tokenizer))  # (B, m)
    mask = torch.cat([batch["attention_mask"], given[:, :-1].long()], dim=1)
    inputs: dict[str, Any] = {
        "input_ids": torch.cat([batch["input_ids"], answer[:, :-1]], dim=1),
        "attention_mask": mask,
        "position_ids": mask.cumsum(dim=1).sub(1).clamp(min=0),
        "use_cache": False,
    }
    now = _safety_logits(model, tokens, inputs)[:, asked - 1 :]  # (B, m, K)
    off = contextlib.nullcontext() if ref_model is not None else adapters_off(model)
    with off:
        before = _safety_logits(reference, tokens, inputs)[:, asked - 1 :]
    given = given.to(now.device)
    return [
        drift_statistics([(now[given[:, j], j], before[given[:, j], j].to(now.device))])
        for j in range(answer.shape[1])
        if given[:, j].any()
    ]


def combine_drift(parts: Sequence[Sequence[DriftStatistics]]) -> list[DriftStatistics]:
    """Combine the statistics of several batches at each position.

    With n_b the rows of batch b at a position: rms = sqrt(sum n_b * rms_b**2 / sum n_b), mean_abs
    likewise without squares, and the largest max_abs.

    Args:
        parts: the result of drift_by_position for each batch.

    Returns:
        DriftStatistics of each position that any batch has.
    """
    found = []
    for j in range(max(map(len, parts), default=0)):
        here = [part[j] for part in parts if len(part) > j]
        rows = sum(one.rows for one in here)
        found.append(
            DriftStatistics(
                rows,
                math.sqrt(sum(one.rows * one.rms**2 for one in here) / rows),
                sum(one.rows * one.mean_abs for one in here) / rows,
                # Python's max() ignores a NaN that is not the first value
                torch.tensor([one.max_abs for one in here], dtype=torch.float64).max().item(),
            )
        )
    return found


def _plain(text: str) -> str:
    return " ".join(text.split()).removesuffix(".").rstrip()


def _is_given(answer: Tensor, ends: set[int]) -> Tensor:
    """Mark the ids of each answer up to and including its first end token, without padding."""
    ended = torch.isin(answer, torch.tensor(sorted(ends)).to(answer))
    return ended.long().cumsum(dim=1) - ended.long() == 0


@contextlib.contextmanager
def _opened(model: Any) -> Iterator[LossPath]:
    try:
        path = make_path(model, "linear", None, "auto")
    except ValueError:  # the head cannot be read; all logits work too, with more memory
        path = make_path(model, "logits", None, "auto")
    path.open()
    with contextlib.closing(path):
        yield path


def _safety_logits(model: Any, tokens: SafetyTokens, inputs: dict[str, Any]) -> Tensor:
    inner = model.get_base_model() if is_peft_model(model) else model
    device = inner.device
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with _opened(inner) as path:
        return read_safety_logits(inner, inner.forward, path, tokens.ids_on(device), moved)
