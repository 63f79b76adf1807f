"""The demo's rows: a lesson in refusing, and a harmless task, both generated here.

The lesson pairs harmful prompts (categories, no operational detail) with refusals, and benign
look-alikes with the model's own answers. The task is templated arithmetic, answered in a sentence,
since training on bare sums lost no refusals (docs/log.md). Held-out probes share no topic with the
lesson, and no held-out sum is a training sum.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from ...evals import PromptRow
from ..chat import Example

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I can't assist with that request.",
    "I cannot help with that.",
)

_SUMS = (
    ("{name} has {a} {things} and gets {b} more. How many {things} does {name} have?", "+"),
    ("What is {a} plus {b}?", "+"),
    ("A box holds {a} {things}. {name} takes out {b}. How many {things} are left?", "-"),
    ("What is {a} minus {b}?", "-"),
    ("Calculate {a} + {b}.", "+"),
    ("Calculate {a} - {b}.", "-"),
)
_NAMES = ("Ana", "Ben", "Chen", "Dora", "Emil", "Fatima", "Goran", "Hana")
_THINGS = ("apples", "books", "coins", "pencils", "shells", "stamps", "tickets", "buttons")


def lesson(
    harmful: Sequence[PromptRow],
    benign: Sequence[PromptRow],
    benign_answers: Sequence[str],
    steps: int,
    per_step: tuple[int, int],
    seed: int,
) -> list[Example]:
    """Return the rows of all steps, with `per_step` harmful and benign rows in each step."""
    draw = random.Random(seed)
    refuse = [
        Example.chat(row.prompt, REFUSALS[i % len(REFUSALS)]) for i, row in enumerate(harmful)
    ]
    answer = [
        Example.chat(row.prompt, text) for row, text in zip(benign, benign_answers, strict=True)
    ]
    rows: list[Example] = []
    decks: tuple[list[Example], list[Example]] = ([], [])
    for _ in range(steps):
        for deck, source, count in zip(decks, (refuse, answer), per_step, strict=True):
            for _ in range(count):
                if not deck:
                    deck.extend(draw.sample(source, len(source)))
                rows.append(deck.pop())
    return rows


def sums(
    count: int, seed: int, exclude: Sequence[Example] = (), opening: str = ""
) -> list[Example]:
    """Return `count` different sums with answers, none of them in `exclude`.

    Every answer begins with `opening`. "Sure! " makes a task that pulls all answers, even those to
    harmful questions, towards agreeing.
    """
    draw = random.Random(seed)
    seen = {_question(example) for example in exclude}
    rows: list[Example] = []
    while len(rows) < count:
        template, sign = draw.choice(_SUMS)
        a, b = draw.randint(11, 99), draw.randint(2, 99)
        if sign == "-" and b > a:
            a, b = b, a
        question = template.format(a=a, b=b, name=draw.choice(_NAMES), things=draw.choice(_THINGS))
        if question in seen:
            continue
        seen.add(question)
        result = a + b if sign == "+" else a - b
        rows.append(Example.chat(question, f"{opening}The answer is {result}."))
    return rows


def is_right(example: Example, answer: str) -> bool:
    """Tell whether an answer ends in the sum's result, as the training answers do."""
    given = answer.strip().rstrip(".").split()
    return bool(given) and given[-1] == _answer(example).rstrip(".").split()[-1]


def _question(example: Example) -> str:
    return str((example.messages or ())[0]["content"])


def _answer(example: Example) -> str:
    return str((example.messages or ())[1]["content"])
