"""Evaluate one model batch by batch, and keep each batch's results when it is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ...evals import DriftStatistics, Judge, Outcome, as_verdict, refusal_rule, wilson_interval
from ...files import Stages, Watcher
from ...tokens import SafetyTokens
from ..chat import (
    Answer,
    Example,
    answer_texts,
    answers_to,
    encode_examples,
    first_tokens,
    render_prompts,
)
from ..loading import longest_row
from .inputs import NamedModel, PromptList
from .measures import (
    EXACT_MATCH_RULE,
    combine_drift,
    drift_by_position,
    held_out_loss,
    is_exact_match,
    question_and_answer,
    text_perplexity,
)
from .options import KEPT_TOKENS, KINDS, EvalOptions


class AskedModel:
    """A model under evaluation; results are kept after each batch, so a run can be resumed."""

    def __init__(
        self, options: EvalOptions, found: NamedModel, stages: Stages, watch: Watcher
    ) -> None:
        self.options = options
        self.model = found.model
        self.tokenizer = found.tokenizer
        self.adapter = found.adapter
        self.stages = stages
        self.watch = watch
        reads = longest_row(found.model)
        self.max_length = min(options.max_length, reads or options.max_length)

    def answers(self, kind: str, prompts: Sequence[str]) -> list[dict[str, Any]]:
        """Answer prompts, each as one chat turn; keep each answer's beginning and outcomes."""
        rules = {name: refusal_rule(name) for name in self.options.rules}

        def make(part: Sequence[str]) -> list[dict[str, Any]]:
            found = answers_to(
                self.model,
                self.tokenizer,
                render_prompts(self.tokenizer, part),
                max_new_tokens=self.options.answer_tokens,
                batch_size=len(part),
            )
            return [
                {
                    "answer": first_tokens(self.tokenizer, given.text, KEPT_TOKENS),
                    "outcomes": {name: _outcome(rule, given) for name, rule in rules.items()},
                }
                for given in found
            ]

        return self._batches(f"answers-{kind}", f"{kind} prompts", prompts, make)

    def verdicts(
        self, kind: str, judge: Judge, prompts: Sequence[str], answers: Sequence[str]
    ) -> list[str]:
        """Ask the judge about each answer."""

        def make(part: Sequence[tuple[str, str]]) -> list[str]:
            try:
                return [as_verdict(judge(*pair)) for pair in part]
            except ValueError as error:
                raise ValueError(
                    f"{error}. All answers and the batches judged so far are kept: the same "
                    "command goes on from here"
                ) from None  # a judge's exceptions may contain its API key

        pairs = list(zip(prompts, answers, strict=True))
        return self._batches(f"judge-{kind}", f"judge: {kind}", pairs, make)

    def task(self, examples: list[Example]) -> dict[str, Any]:
        """Ask the task's questions, and compute the loss on its expected answers."""
        pairs = [question_and_answer(self.tokenizer, example) for example in examples]

        def make(part: Sequence[str]) -> list[str]:
            return answer_texts(
                self.model,
                self.tokenizer,
                part,
                max_new_tokens=self.options.answer_tokens,
                batch_size=len(part),
            )

        given = self._batches("answers-task", "task", [question for question, _ in pairs], make)
        right = [is_exact_match(*both) for both in zip(given, (a for _, a in pairs), strict=True)]
        encoded = encode_examples(self.tokenizer, examples, self.max_length)
        loss = self.stages.result(
            "task-loss", lambda: repr(held_out_loss(self.model, self.tokenizer, encoded))
        )
        lengths = (
            len(self.tokenizer.encode(expected, add_special_tokens=False)) for _, expected in pairs
        )
        return {
            "file": self.options.task.name if self.options.task else None,
            "rule": EXACT_MATCH_RULE,
            "matched": sum(right),
            "total": len(right),
            "interval": list(wilson_interval(sum(right), len(right))),
            # if the expected answer fills all tokens, a match may be the start of a longer answer
            "too_long": sum(length >= self.options.answer_tokens for length in lengths),
            "loss": _finite(loss),
            "outcomes": right,
        }

    def text(self, text: str) -> dict[str, Any]:
        """Measure the perplexity of the text."""
        length = self.max_length
        found = self.stages.result(
            "text",
            lambda: [
                repr(value)
                for value in text_perplexity(
                    self.model,
                    self.tokenizer,
                    text,
                    max_length=length,
                    progress=lambda done, total: self.watch("text", done, total),
                )
            ],
        )
        return {
            "file": self.options.text.name if self.options.text else None,
            "perplexity": _finite(found[0]),
            "nats_per_token": _finite(found[1]),
            "tokens": int(found[2]),
            "max_length": length,
            "stride": max(1, length // 2),
        }

    def drift(
        self,
        tokens: SafetyTokens,
        asked: dict[str, PromptList],
        reference: NamedModel | None,
    ) -> tuple[dict[str, Any] | None, list[str]]:
        """Measure drift at each position of an answer; return None and the reason if impossible."""
        if reference is None and self.adapter is None:
            return None, [
                "Drift is not measured: a model without an adapter needs a reference to have "
                "moved from."
            ]

        def make(part: Sequence[str]) -> list[Any]:
            found = drift_by_position(
                self.model,
                self.tokenizer,
                tokens,
                part,
                self.options.positions,
                ref_model=None if reference is None else reference.model,
            )
            # as text: JSON has no NaN, which a broken model may give
            return [[[one.rows, *map(repr, one[1:])] for one in found]]

        positions = {}
        try:
            for kind in KINDS:
                kept = self._batches(
                    f"drift-{kind}", f"drift: {kind}", asked[kind].prompts, make, one_each=False
                )
                positions[kind] = combine_drift(
                    [
                        [DriftStatistics(rows, *map(float, rest)) for rows, *rest in part]
                        for part in kept
                    ]
                )
        except ValueError as error:
            return None, [f"Drift is not measured: {error}"]
        return {kind: _described_drift(found) for kind, found in positions.items()}, []

    def _batches(
        self,
        name: str,
        shown: str,
        items: Sequence[Any],
        make: Callable[[Sequence[Any]], list[Any]],
        *,
        one_each: bool = True,
    ) -> list[Any]:
        made: list[Any] = []
        size = self.options.batch_size
        for start in range(0, len(items), size):
            part = items[start : start + size]
            found = self.stages.result(f"{name}-{start // size:05d}", partial(make, part))
            if one_each and len(found) != len(part):
                raise RuntimeError(f"{name} has {len(found)} results for {len(part)} items")
            made.extend(found)
            self.watch(shown, start + len(part), len(items))
        return made


def _outcome(rule: Callable[[str], Outcome], given: Answer) -> Outcome:
    """Apply a rule; an answer that was cut too soon can only be a refusal or unfinished."""
    outcome = rule(given.text)
    return "unfinished" if given.unfinished and outcome != "refusal" else outcome


def _described_drift(found: Sequence[DriftStatistics]) -> list[dict[str, Any]]:
    return [
        {
            "position": place,
            "prompts": one.rows,
            "rms": _finite(one.rms),
            "mean_abs": _finite(one.mean_abs),
            "max_abs": _finite(one.max_abs),
        }
        for place, one in enumerate(found, start=1)
    ]


def _finite(value: str | float) -> float | None:
    """Return a number, or None for NaN and infinity, which JSON does not have."""
    number = float(value)
    return number if math.isfinite(number) else None
