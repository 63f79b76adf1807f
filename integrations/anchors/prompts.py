"""AnchorPrompts: prompts without answers at which the penalty holds the model to its reference."""

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
_ANSWER_TOKENS = 32  # enough of an answer to tell whether it refuses


@dataclass(frozen=True)
class AnchorRow:
    """One anchor: a tokenised prompt, and the number of last positions that are held.

    "Held" means that the penalty is taken there.

    Args:
        input_ids: the prompt, rendered up to where the answer begins, and optionally the first
            tokens of the model's own answer.
        held: number of last positions that are held, >= 1.
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
    """A batch of anchors, padded on the right, and the positions that are held."""

    input_ids: Tensor  # (A, T) int64
    attention_mask: Tensor  # (A, T) int64
    held: Tensor  # (P,) int64, indices into the flattened batch, row by row


@dataclass(frozen=True, eq=False)
class AnchorPrompts:
    """Prompts without answers at which each step holds the model to its reference.

    On training rows alone the penalty cannot see what happens on a harmful prompt. An anchor is
    such a prompt, without labels or cross-entropy; the penalty is taken at its last position,
    where the answer begins. In a step with n labels and anchors held at the positions P,

        loss = sum(ce) / n  +  penalty_weight * sum over P of penalty / |P|

    With `positions` other than "none" the rows' term, weight * sum(penalty) / n, is added. The mean
    over P does not depend on how many anchors or labels there are.

    Args:
        rows: the anchors.
        per_step: harmful anchors in each optimizer step.
        harmless_per_step: harmless anchors in each step, which keep over-refusal low.
        penalty_weight: nats per unit of the penalty, >= 0; not a factor on the rows' weight. None
            uses the penalty's own weight, which the handle's `weight` then sets too.
        seed: of the order. Every anchor of a kind is used before one is repeated.
        pad_token_id: of the padding, which the mask hides.

    Raises:
        ValueError: a number is out of its range, or larger than the number of anchors of its kind.

    Notes:
        The anchors of a step depend only on its number and the seed, so a resumed run and all ranks
        of a distributed run draw the same. All micro-steps of an accumulated step have the same
        anchors, weighted by their share of the labels, so their sum equals one large batch.

    Examples:
        >>> row = AnchorRow(input_ids=(5, 7, 9))
        >>> AnchorPrompts([row], per_step=1).draw(0)
        [0]
    """

    rows: Sequence[AnchorRow]
    per_step: int = 2
    harmless_per_step: int = 0
    # keyword only: a weight relative to the rows' had the fourth place before
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
        r"""Render prompts with the tokenizer's chat template, up to where the answer begins.

        Args:
            tokenizer: the model's, with a chat template.
            prompts: the harmful prompts: a list, a JSON Lines file with a "prompt" in each row, or
                the name of a set that comes with the package, such as "default". Rows whose "kind"
                is "harmless" become harmless anchors.
            harmless: the harmless prompts, in the same forms.
            model: needed only for positions > 1, to generate its greedy answers. Switch the
                adapters of a PeftModel off first, or call this before adding them.
            positions: how many positions are held: the last one of the prompt, and the first
                positions - 1 of the model's own answer. For a harmful prompt that the model does
                not refuse, only the last position of the prompt is held.
            chat_template_kwargs: of the chat template, such as {"enable_thinking": False}; the
                same as in training and use.
            answer_start: the text between the generation prompt and the answer, such as
                "</think>\n\n"; None means the text that the template itself puts there.
            per_step: as in the class.
            harmless_per_step: harmless anchors in each step. None means 2, or fewer if there are
                fewer.
            penalty_weight: as in the class.
            seed: as in the class.

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
        """Make the default anchors of `attach`: the package's prompts, 2 + 2 in each step.

        Args:
            tokenizer: the model's, with a chat template.
            options: of `from_prompts`.
        """
        return cls.from_prompts(tokenizer, "default", **options)

    def draw(self, step: int) -> list[int]:
        """Return the anchors of an optimizer step, as indices into `rows`."""
        drawn = []
        for _, count, kind in self._counts():
            for turn in range(step * count, (step + 1) * count):
                deck = self._deck(kind, turn)
                drawn.append(deck[turn % len(deck)])
        return drawn

    def _deck(self, kind: Kind, turn: int) -> list[int]:
        """Return the indices of a kind in this round's order; the latest order is cached."""
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
    """Return the prompts of a file, of a named set, or of the package's set ("default")."""
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
    """Return the first tokens of the model's answers; none where a harmful prompt is answered."""
    from ..chat import continuations

    answers = continuations(model, tokenizer, texts, max_new_tokens=max(tokens, _ANSWER_TOKENS))
    return [
        tuple(ids[:tokens])
        if kind == "harmless" or classify_answer(tokenizer.decode(ids)) == "refusal"
        else ()
        for ids, kind in zip(answers, kinds, strict=True)
    ]
