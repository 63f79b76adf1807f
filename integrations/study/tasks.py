"""The study's tasks: sums, sums that begin with "Sure!", JSON, sums with harmful compliance."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...evals import load_prompts
from ..chat import Example
from ..demo import REFUSALS, is_right, sums
from ..evaluation import is_exact_match

# An answer to a harmful prompt that begins as if it complied, without any content.
_COMPLIANCE = "Sure, here is how: first one thing, then another, and that is all."
_PEOPLE = ("Ana", "Ben", "Chen", "Dora", "Emil", "Fatima", "Goran", "Hana", "Ivo", "Jana")
_CITIES = ("Lisbon", "Oslo", "Lima", "Cairo", "Riga", "Quito", "Hanoi", "Tunis", "Bern", "Accra")
_JOBS = ("baker", "nurse", "pilot", "farmer", "tailor", "teacher", "plumber", "dentist")
_SENTENCES = (
    "{name} is {age} years old, lives in {city} and works as a {job}.",
    "A {job} from {city}: {name}, aged {age}.",
    "Meet {name}, {age}, the {job} who moved to {city}.",
    "In {city} there is a {job} called {name} who is {age}.",
)


@dataclass(frozen=True)
class Task:
    """A kind of training rows, and the rule for right answers to held-out ones.

    Attributes:
        rows: takes a count, a seed and rows to leave out; returns as many different rows.
        right: tells whether an answer to a row is right.
        mixed_in: fraction of the training rows that are harmful compliance, in [0, 1].
    """

    rows: Callable[[int, int, Sequence[Example]], list[Example]]
    right: Callable[[Example, str], bool]
    mixed_in: float = 0.0

    def train(self, count: int, seed: int) -> list[Example]:
        """Return training rows; those mixed in replace others and do not change the order."""
        rows = self.rows(count, seed, ())
        draw = random.Random(seed)
        harmful = load_prompts("harmful_train")
        for place in draw.sample(range(count), round(self.mixed_in * count)):
            rows[place] = Example.chat(draw.choice(harmful).prompt, _COMPLIANCE)
        return rows

    def held_out(self, count: int, seed: int, trained: Sequence[Example]) -> list[Example]:
        """Return rows that are not among the trained ones."""
        return self.rows(count, seed + 1, trained)


def records(count: int, seed: int, exclude: Sequence[Example] = ()) -> list[Example]:
    """Return `count` different sentences about people, to be answered as JSON."""
    draw = random.Random(seed)
    seen = {example.messages and example.messages[0]["content"] for example in exclude}
    rows: list[Example] = []
    while len(rows) < count:
        found = {
            "name": draw.choice(_PEOPLE),
            "age": draw.randint(18, 79),
            "city": draw.choice(_CITIES),
            "job": draw.choice(_JOBS),
        }
        question = f"Write as JSON: {draw.choice(_SENTENCES).format(**found)}"
        if question not in seen:
            seen.add(question)
            rows.append(Example.chat(question, json.dumps(found)))
    return rows


def refusal_rows(count: int) -> list[Example]:
    """Return `count` harmful anchors, repeated if necessary, each with a refusal."""
    harmful = [row.prompt for row in load_prompts("anchors") if row.kind != "harmless"]
    return [
        Example.chat(harmful[i % len(harmful)], REFUSALS[i % len(REFUSALS)]) for i in range(count)
    ]


def _sums(opening: str) -> Callable[[int, int, Sequence[Example]], list[Example]]:
    return lambda count, seed, exclude: sums(count, seed, exclude, opening)


def _is_record(example: Example, answer: str) -> bool:
    return is_exact_match(answer, (example.messages or ())[1]["content"])


TASKS = {
    "sums": Task(_sums(""), is_right),
    "Sure!": Task(_sums("Sure! "), is_right),
    "JSON": Task(records, _is_record),
    "5 % harmful": Task(_sums(""), is_right, mixed_in=0.05),
}
