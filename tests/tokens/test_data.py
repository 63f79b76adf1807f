"""What the prompts and phrases that come with the package promise about themselves."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

import str_kernels
from str_kernels.evals import PromptRow, classify_answer, load_prompts
from str_kernels.evals.refusals import PROMPT_SETS, normalise

DATA = Path(str_kernels.__file__).parent / "data"
SIZES = {
    "harmful_train": 120,
    "benign_train": 120,
    "harmful_probes": 100,
    "benign_probes": 100,
    "anchors": 128,
}

TEMPLATES = (
    r"How do I .*\?",
    r"How can I .*\?",
    r"What is the best way to .*\?",
    r"Can you show me how to .*\?",
    r"I want to .*\. What should I do\?",
    r"Explain how to .*\.",
    r"Help me .*\.",
    r"Give me instructions to .*\.",
    r"Tell me how to .*\.",
    r"Teach me to .*\.",
    r"Write .*\.",
    r"Give me (?!instructions to ).*\.",
    r"Draft .*\.",
    r"Create .*\.",
)

# Beginnings of words that sound like harm; each is in a harmful prompt and in a benign one.
SCARY = (
    *("attack", "beat", "blood", "bomb", "burn", "cheat", "counterfeit", "crack", "crash", "dead"),
    *("drown", "dynamite", "escape", "explo", "fire", "forge", "gas", "gun", "hack", "hunt"),
    *("kill", "knife", "phish", "poison", "ransom", "scam", "shoot", "spy", "steal", "stole"),
    *("thie", "trap", "virus", "weapon"),
)


def rows_of(kind: str, part: str) -> list[PromptRow]:
    """Return the harmful or the benign rows of a pair of sets, or of the set that holds both."""
    if part != "anchors":
        return load_prompts(f"{kind}_{part}")
    wanted = {"harmful": "harmful", "benign": "harmless"}[kind]
    return [row for row in load_prompts(part) if row.kind == wanted]


def topic_words(topic: str) -> set[str]:
    """Return the words of a topic without plural and verb endings."""
    words = re.findall(r"[a-z]+", topic.lower())
    return {re.sub(r"(?<=\w{3})(ing|ed|s)$", "", word) for word in words}


def template(prompt: str) -> str:
    matching = [pattern for pattern in TEMPLATES if re.fullmatch(pattern, prompt)]
    assert len(matching) == 1, f"{prompt!r} has {len(matching)} templates"
    return matching[0]


def scary_words(prompt: str) -> set[str]:
    words = re.findall(r"[a-z]+", prompt.lower())
    return {stem for stem in SCARY if any(word.startswith(stem) for word in words)}


def test_the_sets_are_large_enough_and_every_topic_is_short() -> None:
    assert set(SIZES) == set(PROMPT_SETS)
    for name, size in SIZES.items():
        rows = load_prompts(name)
        assert len(rows) >= size
        assert len({row.topic for row in rows}) == len(rows), f"{name} repeats a topic"
        for row in rows:
            assert 1 <= len(row.topic.split()) <= 3, row
            assert len(row.prompt.split()) <= 20, row


def test_no_prompt_is_there_twice() -> None:
    prompts = Counter(row.prompt.lower() for name in SIZES for row in load_prompts(name))
    assert [prompt for prompt, count in prompts.items() if count > 1] == []


@pytest.mark.parametrize("kind", ["harmful", "benign"])
def test_probes_share_no_topic_word_with_training(kind: str) -> None:
    train, probes = (
        set().union(*(topic_words(row.topic) for row in load_prompts(f"{kind}_{part}")))
        for part in ("train", "probes")
    )
    assert train & probes == set()


def test_anchors_share_no_topic_word_with_any_probe() -> None:
    anchors, probes = (
        set().union(*(topic_words(row.topic) for name in names for row in load_prompts(name)))
        for names in (["anchors"], ["harmful_probes", "benign_probes"])
    )
    assert anchors & probes == set()
    lessons = {row.topic for kind in ("harmful", "benign") for row in load_prompts(f"{kind}_train")}
    assert lessons & {row.topic for row in load_prompts("anchors")} == set()


def test_anchors_of_both_kinds_are_as_many_and_worded_alike() -> None:
    rows = load_prompts("anchors")
    kinds = [[row.prompt for row in rows if row.kind == kind] for kind in ("harmful", "harmless")]
    harmful, harmless = kinds
    assert len(harmful) == len(harmless) >= 64 and len(rows) == len(harmful) + len(harmless)
    assert Counter(map(template, harmful)) == Counter(map(template, harmless))
    lengths = [sum(len(prompt.split()) for prompt in prompts) for prompts in kinds]
    assert abs(lengths[0] - lengths[1]) <= 0.5 * len(harmful)
    assert sum(bool(scary_words(prompt)) for prompt in harmless) >= 0.4 * len(harmless)


def test_the_stemmer_sees_through_endings() -> None:
    assert topic_words("Bank robberies") & topic_words("robbing banks") == {"bank"}
    assert topic_words("hacked hacking hacks") == {"hack"}


@pytest.mark.parametrize("part", ["train", "probes", "anchors"])
def test_harmful_and_benign_are_worded_alike(part: str) -> None:
    harmful, benign = (
        [row.prompt for row in rows_of(kind, part)] for kind in ("harmful", "benign")
    )
    shares = [Counter(map(template, prompts)) for prompts in (harmful, benign)]
    for pattern in TEMPLATES:
        one, other = shares[0][pattern] / len(harmful), shares[1][pattern] / len(benign)
        assert one > 0.03, pattern
        assert abs(one - other) <= 0.02, pattern
    lengths = [sum(len(p.split()) for p in prompts) / len(prompts) for prompts in (harmful, benign)]
    assert abs(lengths[0] - lengths[1]) <= 0.5


@pytest.mark.parametrize("part", ["train", "probes", "anchors"])
def test_many_benign_prompts_sound_harmful(part: str) -> None:
    rows = rows_of("benign", part)
    assert sum(bool(scary_words(row.prompt)) for row in rows) >= 0.4 * len(rows)


def test_scary_words_are_in_harmful_and_in_benign_prompts() -> None:
    for kind in ("harmful", "benign"):
        found = [
            scary_words(row.prompt)
            for part in ("train", "probes")
            for row in load_prompts(f"{kind}_{part}")
        ]
        assert set(SCARY) - set().union(*found) == set(), kind


def test_templates_are_short_varied_refusals_by_our_own_rule() -> None:
    text = (DATA / "refusal_templates.txt").read_text("utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(set(lines)) >= 30
    for line in lines:
        assert classify_answer(line) == "refusal", line
        assert line.isascii(), line
        assert line == line.strip(), line
        assert len(line.split()) <= 14, line
    assert len({line.split()[0] for line in lines}) >= 12
    assert len({" ".join(line.split()[:2]) for line in lines}) >= 20


def test_phrases_are_written_as_answers_are_compared() -> None:
    phrases = json.loads((DATA / "refusal_phrases.json").read_text("utf-8"))["opening"]
    assert phrases == sorted(set(phrases))
    for phrase in phrases:
        assert normalise(phrase) == phrase
        assert classify_answer(f"{phrase} x y z") == "refusal"


def test_no_prompt_is_taken_for_a_refusal() -> None:
    for name in SIZES:
        for row in load_prompts(name):
            assert classify_answer(row.prompt) == "other", row
