"""Thoughts before an answer, as chat templates mark them: told apart, and taken off."""

from __future__ import annotations

# Marks of the templates in TRL's package, and Cohere's. A block has an end of its own; of channels
# the thought's is named where it opens, and ends where another opens.
_BLOCKS = (
    ("<think>", "</think>"),
    ("<|channel>thought", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
_CHANNELS = (
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
    (" to=self<|message|>", " to=user<|message|>"),
)


def without_thought(text: str) -> str | None:
    r"""Return an answer without what was thought before it.

    Args:
        text: what a model wrote, with the marks of its thoughts. A thought that the prompt opened
            may lack its first mark.

    Returns:
        The answer; None where the text ends inside a thought.

    Examples:
        >>> without_thought("<think>\nHm.\n</think>\n\nI can't.")
        "I can't."
        >>> without_thought("Hm. </think>I can't."), without_thought("<think>\nHm. Let me")
        ("I can't.", None)
    """
    for thought, answer in _CHANNELS:
        _, mark, after = text.rpartition(answer)
        if mark:
            text = after
        elif thought in text:
            return None
    for start, end in _BLOCKS:
        while end in text:
            head, _, tail = text.partition(end)
            before = head.partition(start)[0] if start in head else ""
            text = (before + tail.lstrip()).lstrip()
        before, mark, _ = text.partition(start)
        if mark:
            if not before.strip():
                return None
            text = before
    return text


def opened_thought(prompt: str) -> str:
    r"""Return the mark of the thought that a rendered prompt ends inside; "" where there is none.

    Examples:
        >>> opened_thought("<|im_start|>assistant\n<think>\n"), opened_thought("Hi.")
        ('<think>', '')
    """
    for start, end in _BLOCKS:
        if prompt.rfind(start) > prompt.rfind(end):
            return start
    return ""


def has_marks(text: str) -> bool:
    """Tell whether a text has a mark of a thought or of a channel."""
    return any(mark in text for pair in (*_BLOCKS, *_CHANNELS) for mark in pair)
