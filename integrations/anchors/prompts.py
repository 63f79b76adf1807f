"""AnchorPrompts: prompts without answers at which the model is held, beside the training rows."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ...evals import classify_answer, read_prompt_rows
from ...op import check_number
from ..chat import render_answer_starts

Kind = Literal["harmful", "harmless"]
_PACKAGE_SET = "anchors"  # the package's set; no probe shares a topic with it
_ANSWER_TOKENS = 32  # of an answer, to tell whether it refuses


@dataclass(frozen=True)
class AnchorRow:
    """One anchor: a tokenised context and how much of its end is held.

    Args:
        input_ids: the prompt, rendered up to where the answer begins, and perhaps the first
            tokens of the model's own answer.
        held: the penalty is taken at this many last positions, >= 1.
        kind: "harmful" or "harmless".
    """

    input_ids: tuple[int, ...]
    held: int = 1
    kind: Kind = "harmful"

    def __post_init__(self) -> None:
        if not 1 <= self.held <= len(self.input_ids):
            raise ValueError(
                f"`held` must be in [1, {len(self.input_ids)}], the anchor's length; "
                f"got {self.held}"
            )
        if self.kind not in get_args(Kind):
            raise ValueError(f"`kind` must be 'harmful' or 'harmless'; got {self.kind!r}")


class AnchorBatch(NamedTuple):
    """Some anchors as a model takes them, padded on the right, and where they are held."""

    input_ids: Tensor  # (A, T) int64
    attention_mask: Tensor  # (A, T) int64
    held: Tensor  # (P,) int64, in the batch made flat; row by row


@dataclass(frozen=True, eq=False)
class AnchorPrompts:
    """Prompts at which the model is held to its reference in each step, without any answer.

    In the training contexts alone the penalty cannot see what happens on a harmful prompt. An
    anchor is such a prompt: no cross-entropy, no label, the penalty at its last position, where
    the answer begins. In a step with the anchors A, their held positions P and n labels

        loss = sum(ce) / n  +  penalty_weight * sum over P of penalty / |P|

    and with `positions` other than "none" the rows' own term, weight * sum(penalty) / n, beside it.
    The mean over P does not depend on how many anchors or labels there are.

    Args:
        rows: the anchors.
        per_step: harmful anchors in each optimizer step.
        harmless_per_step: harmless ones; they hold over-refusal down.
        penalty_weight: nats per unit of the penalty, >= 0, by itself and not times the rows'. The
            penalty's own weight when None, which the handle's `weight` then sets too.
        seed: of the order. Every anchor of a kind has its turn before one comes again.
        pad_token_id: of the padding, which the mask hides.

    Raises:
        ValueError: a number is out of its range, or there is no anchor of a kind that is asked
            for.

    Notes:
        Which anchors a step has depends on its number and the seed alone, so that a resumed run
        and every rank of a distributed one draw the same. Each micro-step of an accumulated step
        has the same anchors, weighed by its share of the labels: the sum is that of one large
        batch.

    Examples:
        >>> row = AnchorRow(input_ids=(5, 7, 9))
        >>> AnchorPrompts([row], per_step=1).draw(0)
        [0]
    """

    rows: Sequence[AnchorRow]
    per_step: int = 2
    harmless_per_step: int = 0
    # by name: in the fourth place was a weight relative to the rows'
    penalty_weight: float | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    pad_token_id: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        if self.penalty_weight is not None:
            check_number("penalty_weight", self.penalty_weight)
        for name, count, kind in self._counts():
            if count < 0:
                raise ValueError(f"`{name}` must be >= 0; got {count}")
            there = sum(row.kind == kind for row in self.rows)
            if count > there:
                raise ValueError(f"`{name}` must be at most {there}, the {kind} rows; got {count}")
        if not self.per_step + self.harmless_per_step:
            raise ValueError("`per_step` and `harmless_per_step` must not both be 0")

    def __len__(self) -> int:
        """Return the number of anchors."""
        return len(self.rows)

    @classmethod
    def from_prompts(
        cls,
        tokenizer: Any,
        prompts: str | Path | Sequence[str] = "default",
        harmless: str | Path | Sequence[str] | None = None,
        *,
        model: Any = None,
        positions: int = 1,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        answer_start: str | None = None,
        per_step: int = 2,
        harmless_per_step: int | None = None,
        penalty_weight: float | None = None,
        seed: int = 0,
    ) -> AnchorPrompts:
        r"""Render prompts by the tokenizer's chat template, up to where the answer begins.

        Args:
            tokenizer: of the model, with a chat template.
            prompts: the harmful ones: a list, a JSON Lines file with a "prompt" in each row, or
                the name of a set that comes with the package, which "default" is one of. Rows
                whose "kind" is "harmless" are taken as that.
            harmless: the same for harmless prompts.
            model: needed for positions > 1 alone: its own greedy answers are continued. For a
                PeftModel switch the adapters off first, or call this before adding them.
            positions: how many positions are held: the last of the prompt, and the first
                positions - 1 of the model's own answer. A harmful prompt that the model does not
                refuse has no such answer: its last position alone is held.
            chat_template_kwargs: of the chat template, such as {"enable_thinking": False}; the
                same as in training and use.
            answer_start: the text between the generation prompt and the answer, such as
                "</think>\n\n"; what the template itself puts there when None.
            per_step: as in the class; so are the others.
            harmless_per_step: harmless anchors of a step; 2 when None, or as many as there are.
            penalty_weight: of the penalty at the anchors.
            seed: of the order.

        Returns:
            The AnchorPrompts.

        Raises:
            ValueError: a file is missing or broken, a list is empty, `model` is missing, or the
                chat template does not show where an answer begins; the message names the option.
        """
        if positions < 1 or (positions > 1 and model is None):
            raise ValueError(
                f"`positions` must be 1, or more with `model`, whose answers are held; "
                f"got {positions}, model {type(model).__name__}"
            )
        asked = _read("prompts", prompts, "harmful")
        if harmless is not None:
            asked += _read("harmless", harmless, "harmless")
        texts = render_answer_starts(
            tokenizer,
            [prompt for prompt, _ in asked],
            chat_template_kwargs=chat_template_kwargs,
            answer_start=answer_start,
        )
        contexts = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        answers: list[tuple[int, ...]] = [()] * len(asked)
        if positions > 1:
            kinds = [kind for _, kind in asked]
            answers = _own_answers(model, tokenizer, texts, kinds, positions - 1)
        rows = [
            AnchorRow(context + answer, 1 + len(answer), kind)
            for context, answer, (_, kind) in zip(contexts, answers, asked, strict=True)
        ]
        if harmless_per_step is None:
            harmless_per_step = min(2, sum(kind == "harmless" for _, kind in asked))
        return cls(
            rows,
            per_step,
            harmless_per_step,
            penalty_weight=penalty_weight,
            seed=seed,
            pad_token_id=tokenizer.pad_token_id or 0,
        )

    @classmethod
    def default(cls, tokenizer: Any, **options: Any) -> AnchorPrompts:
        """Make what `attach` holds by default: the package's prompts, 2 + 2 in each step.

        Args:
            tokenizer: of the model, with a chat template.
            options: of `from_prompts`.
        """
        return cls.from_prompts(tokenizer, "default", **options)

    def draw(self, step: int) -> list[int]:
        """Return which anchors, by their place in `rows`, are held in an optimizer step."""
        drawn = []
        for _, count, kind in self._counts():
            for turn in range(step * count, (step + 1) * count):
                deck = self._deck(kind, turn)
                drawn.append(deck[turn % len(deck)])
        return drawn

    def _deck(self, kind: Kind, turn: int) -> list[int]:
        """Return the places of a kind in the order of the turn's round; the last one is kept."""
        places = [place for place, row in enumerate(self.rows) if row.kind == kind]
        key = (kind, turn // max(len(places), 1))
        decks: dict[Any, list[int]] = self.__dict__.setdefault("_decks", {})
        if key not in decks:
            for old in [one for one in decks if one[0] == kind]:
                del decks[old]
            shuffled = random.Random(f"{self.seed} {key[0]} {key[1]}")
            decks[key] = shuffled.sample(places, len(places))
        return decks[key]

    def batch(self, places: Sequence[int], device: torch.device | str = "cpu") -> AnchorBatch:
        """Pad the rows at `places` into one batch."""
        rows = [self.rows[place] for place in places]
        length = max(len(row.input_ids) for row in rows)
        ids = torch.full((len(rows), length), self.pad_token_id, dtype=torch.int64)
        column = torch.arange(length)
        ends = torch.tensor([len(row.input_ids) for row in rows]).unsqueeze(1)
        held = torch.tensor([row.held for row in rows]).unsqueeze(1)
        for place, row in enumerate(rows):
            ids[place, : len(row.input_ids)] = torch.tensor(row.input_ids)
        mask = column < ends
        at = (mask & (column >= ends - held)).flatten().nonzero().squeeze(1)
        return AnchorBatch(ids.to(device), mask.long().to(device), at.to(device))

    def _counts(self) -> tuple[tuple[str, int, Kind], ...]:
        return (
            ("per_step", self.per_step, "harmful"),
            ("harmless_per_step", self.harmless_per_step, "harmless"),
        )


def read_prompts(source: str | Path) -> list[str]:
    """Return the prompts of a file, of a set by its name, or of the package ("default")."""
    return [prompt for prompt, _ in _read("anchors", source, "harmful")]


def _read(argument: str, source: str | Path | Sequence[str], kind: Kind) -> list[tuple[str, Kind]]:
    if not isinstance(source, (str, Path)):
        if not source:
            raise ValueError(f"`{argument}` must hold at least one prompt; got an empty list")
        return [(prompt, kind) for prompt in source]
    rows = read_prompt_rows(argument, _PACKAGE_SET if source == "default" else source)
    return [(row.prompt, "harmless" if row.kind == "harmless" else kind) for row in rows]


def _own_answers(
    model: Any, tokenizer: Any, texts: Sequence[str], kinds: Sequence[Kind], tokens: int
) -> list[tuple[int, ...]]:
    """Return the first tokens of the model's own answers; none where it does not refuse."""
    from ..chat import continuations

    answers = continuations(model, tokenizer, texts, max_new_tokens=max(tokens, _ANSWER_TOKENS))
    return [
        tuple(ids[:tokens])
        if kind == "harmless" or classify_answer(tokenizer.decode(ids)) == "refusal"
        else ()
        for ids, kind in zip(answers, kinds, strict=True)
    ]
