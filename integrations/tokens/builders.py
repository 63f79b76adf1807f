"""Safety tokens from the aligned model's answers: its refusals, and how they differ from others.

Both builders ask the model, keep the answers that `classify_answer` puts into the wanted class, and
look at the first positions of these. Do not use prompts on which refusals are counted later.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...evals import Outcome, classify_answer
from ...files import Watcher
from ...op import accumulation_dtype
from ...tokens import SafetyTokens
from ..chat import answer_ids, render_prompts
from ..models import base_of, contiguous_head_input, evaluation_mode


def from_refusals(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    count: int = 32,
    positions: int = 8,
    answer_tokens: int = 24,
    batch_size: int = 16,
    watch: Watcher | None = None,
) -> SafetyTokens:
    """Choose the tokens that the model's own refusals begin with.

    The model answers each prompt greedily. Let R be the answers that `classify_answer` calls
    refusals, t_i(v) in {0, 1, ...} the first position of token v in answer i, and m = positions:

        score(v) = 1 / |R| * sum over i in R with t_i(v) < m of (1 - t_i(v) / m)

    The score is 1 for a token that every refusal opens with. It is lower for a token that fewer
    refusals have, or that comes later in them.

    Args:
        model: the aligned causal LM; its training mode is restored.
        tokenizer: the model's, with a chat template and a padding token.
        prompts: harmful prompts, strings.
        count: K, the maximum number of tokens, >= 1.
        positions: m, tokens from the start of an answer, in [1, answer_tokens].
        answer_tokens: tokens of an answer that are generated and classified.
        batch_size: prompts at a time, >= 1.
        watch: called with a stage's name, the amount done and the total.

    Returns:
        SafetyTokens by falling score (then by id), without special tokens. Their scores are those
        above, in (0, 1]; they have no id_weights.

    Raises:
        TypeError: prompts is one string.
        ValueError: a number is out of its range, or the model refuses none of the prompts.

    Notes:
        Deterministic; the batch size matters only where rounding changes a greedy choice. A rule
        decides which answers are refusals, see `classify_answer`.

    References:
        Bach and Tran 2026, arXiv:2604.17210, use the tokens of the model's own rejections; this
        score is ours.
    """
    asking = _Asking(model, tokenizer, positions, answer_tokens, batch_size, watch)
    _check_count(count)
    refusals = asking.answers("prompts", prompts, "refusal", at_least=1)
    special = set(tokenizer.all_special_ids)
    points: Counter[int] = Counter()  # scores times m |R|, as integers: no rounding
    for answer in refusals:
        for at, token in enumerate(answer.ids[:positions]):
            if token not in special and token not in answer.ids[:at]:
                points[token] += positions - at
    best = sorted(points, key=lambda token: (-points[token], token))[:count]
    return SafetyTokens.from_ids(
        tokenizer,
        best,
        source=f"the model's {len(refusals)} refusals of {len(prompts)} harmful prompts, "
        f"first {positions} positions (score: 1 opens each of them)",
        scores=[points[token] / (positions * len(refusals)) for token in best],
    )


def from_contrast(
    model: Any,
    tokenizer: Any,
    harmful: Sequence[str],
    harmless: Sequence[str],
    *,
    count: int = 32,
    positions: int = 8,
    floor: float = 1e-3,
    answer_tokens: int = 24,
    batch_size: int = 16,
    watch: Watcher | None = None,
) -> SafetyTokens:
    """Choose the tokens whose probability differs most between refusals and other answers.

    The model answers all prompts greedily. Let H be its refusals of the harmful ones and B its
    ordinary answers to the harmless ones (`classify_answer` says "refusal" and "other"), p_it(v)
    the probability of token v at position t of answer i, and n_i = min(m, length of answer i) with
    m = positions:

        q_i(v)   = mean over t < n_i of p_it(v)
        mu_X(v)  = mean over i in X of q_i(v)                        X is H or B
        s2_X(v)  = sum over i in X of (q_i(v) - mu_X(v))**2 / (|X| - 1)
        score(v) = (mu_H(v) - mu_B(v)) / (sqrt(s2_H(v) / |H| + s2_B(v) / |B|) + floor)

    and for the set S of the K ids with the highest positive scores

        id_weights(v) = score(v) / (mean over u in S of score(u))

    Args:
        model: the aligned causal LM; its training mode is restored.
        tokenizer: the model's, with a chat template and a padding token.
        harmful: prompts, strings.
        harmless: prompts worded like them, strings.
        count: K, the maximum number of tokens, >= 1.
        positions: m, tokens from the start of an answer, in [1, answer_tokens].
        floor: added to the standard error, probability, > 0. It keeps the score low for a token
            whose probability differs by less, however constant the difference.
        answer_tokens: tokens of an answer that are generated and classified.
        batch_size: prompts at a time, >= 1.
        watch: called with a stage's name, the amount done and the total.

    Returns:
        SafetyTokens by falling score (then by id), without special tokens, with scores > 0
        (roughly in standard errors) and id_weights (>= 0, mean 1).

    Raises:
        TypeError: harmful or harmless is one string.
        ValueError: a number is out of its range; the model refuses fewer than two harmful prompts
            or gives fewer than two harmless ones an ordinary answer; its logits are not finite.

    Notes:
        Memory: two float64 vectors of V for each of H and B, and the logits of one batch, which are
        (batch_size, m, V) if the model's forward takes `logits_to_keep`. Probabilities are float32
        (float64 for a float64 model). The variance is computed from sums and sums of squares in
        float64, whose rounding of 1e-16 is far below floor**2. Deterministic; the batch size
        changes only rounding.

    References:
        Wang et al. 2026, arXiv:2603.07445 (PACT), select safety tokens by the aligned model's
        confidence in them; the contrast within one model and this score are ours. The floor is
        that of Tusher, Tibshirani and Chu 2001, PNAS 98(9), 5116-5121.
    """
    asking = _Asking(model, tokenizer, positions, answer_tokens, batch_size, watch)
    _check_count(count)
    if not floor > 0:
        raise ValueError(f"`floor` must be > 0; got {floor}")
    refusals = asking.answers("harmful", harmful, "refusal", at_least=2)
    ordinary = asking.answers("harmless", harmless, "other", at_least=2)
    one = asking.probabilities("look into refusals", refusals)
    other = asking.probabilities("look into answers", ordinary)
    score = (one.mean() - other.mean()) / ((one.error() + other.error()).sqrt() + floor)
    if not bool(score.isfinite().all()):
        raise ValueError("`model` must give finite logits; got others on its own answers")
    allowed = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    order = score.argsort(descending=True, stable=True).tolist()  # stable: then by id
    best = [token for token in order if token in allowed and score[token] > 0][:count]
    chosen = score[best]
    return SafetyTokens.from_ids(
        tokenizer,
        best,
        source=f"{len(refusals)} refusals of {len(harmful)} harmful prompts against "
        f"{len(ordinary)} answers to {len(harmless)} harmless ones, first {positions} positions "
        "(score: difference in probability, in standard errors)",
        id_weights=chosen / chosen.mean(),
        scores=chosen.tolist(),
    )


@dataclass(frozen=True)
class _Answer:
    """A rendered prompt, and the model's answer to it."""

    prompt: str
    ids: list[int]


class _Sums:
    """Mean and squared standard error of vectors that are added one at a time."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | float = 0.0  # (V,) float64 from the first one on
        self.squares: Tensor | float = 0.0

    def add(self, values: Tensor) -> None:  # (V,) float64
        self.count += 1
        self.total = self.total + values
        self.squares = self.squares + values.square()

    def mean(self) -> Tensor:  # (V,)
        return torch.as_tensor(self.total / self.count)

    def error(self) -> Tensor:  # (V,)
        spread = self.squares - self.count * self.mean().square()
        return torch.as_tensor(spread).clamp(min=0) / (self.count - 1) / self.count


@dataclass(frozen=True)
class _Asking:
    """A model, and the options by which it is asked."""

    model: Any
    tokenizer: Any
    positions: int
    answer_tokens: int
    batch_size: int
    watch: Watcher | None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be >= 1; got {self.batch_size}")
        if not 1 <= self.positions <= self.answer_tokens:
            raise ValueError(
                f"`positions` must be in [1, {self.answer_tokens}], the tokens of an answer; got "
                f"{self.positions}"
            )

    def answers(
        self, name: str, prompts: Sequence[str], wanted: Outcome, at_least: int
    ) -> list[_Answer]:
        """Ask, and keep the answers of the wanted class; ValueError if there are too few."""
        if isinstance(prompts, str):
            raise TypeError(f"`{name}` must be a sequence of strings; got the string {prompts!r}")
        stage = f"answer {'harmless' if name == 'harmless' else 'harmful'} prompts"
        ids = answer_ids(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=self.answer_tokens,
            batch_size=self.batch_size,
            progress=self._counting(stage, len(prompts)),
        )
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        kept = [
            _Answer(rendered, answer)
            for rendered, answer, text in zip(
                render_prompts(self.tokenizer, prompts), ids, texts, strict=True
            )
            if classify_answer(text) == wanted
        ]
        if len(kept) < at_least:
            verb = "refuses" if wanted == "refusal" else "answers without refusing"
            raise ValueError(
                f"`{name}` must hold at least {at_least} prompt{'s' * (at_least > 1)} that the "
                f"model {verb}; it does so to {len(kept)} of {len(prompts)}"
            )
        return kept

    def probabilities(self, stage: str, answers: Sequence[_Answer]) -> _Sums:
        """Average the probabilities over each answer's first positions, and sum over answers."""
        sums = _Sums()
        done = self._counting(stage, len(answers))
        order = sorted(answers, key=lambda answer: len(answer.prompt))
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            lengths = [min(self.positions, len(answer.ids)) for answer in part]
            for logits, length in zip(self._logits(part, lengths), lengths, strict=True):
                rows = logits[-length:]
                shares = rows.to(accumulation_dtype(rows.dtype)).softmax(dim=-1).mean(dim=0)
                sums.add(shares.cpu().double())  # not every device has float64
            done(len(part))
        return sums

    def _logits(self, part: Sequence[_Answer], lengths: Sequence[int]) -> Tensor:  # (B, <= T, V)
        """Return the logits of the answers' tokens; those of answer i are the last lengths[i]."""
        rows = [
            [
                *self.tokenizer.encode(answer.prompt, add_special_tokens=False),
                *answer.ids[: length - 1],
            ]
            for answer, length in zip(part, lengths, strict=True)
        ]
        batch = dict(
            self.tokenizer.pad(
                {"input_ids": rows}, padding=True, padding_side="left", return_tensors="pt"
            ).to(self.model.device)
        )
        known = inspect.signature(base_of(self.model).forward).parameters
        if "position_ids" in known:
            batch["position_ids"] = batch["attention_mask"].cumsum(dim=1).sub(1).clamp(min=0)
        if "logits_to_keep" in known:
            batch["logits_to_keep"] = max(lengths)
        head_is_fast = contiguous_head_input(base_of(self.model))
        with torch.inference_mode(), evaluation_mode(self.model), head_is_fast:
            logits: Tensor = self.model(**batch).logits
        return logits

    def _counting(self, stage: str, total: int) -> Callable[[int], None]:
        seen = 0

        def progress(more: int) -> None:
            nonlocal seen
            seen += more
            if self.watch is not None:
                self.watch(stage, seen, total)

        return progress


def _check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"`count` must be >= 1; got {count}")
