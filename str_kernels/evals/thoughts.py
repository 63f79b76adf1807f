"""Thoughts before an answer, as chat templates mark them: told apart, and taken off."""

from __future__ import annotations

import re

# Marks of the templates in TRL's package, and Cohere's. A block has an end of its own; of channels
# the thought's is named where it opens, and ends where the answer's opens.
_BLOCKS = (
    ("<think>", "</think>"),
    ("<|channel>thought", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
_CHANNELS = (
    (
        "<|channel|>analysis<|message|>",
        re.compile(r"<\|channel\|>final[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>"),
    ),
    (" to=self<|message|>", re.compile(r" to=user<\|message\|>")),
)
_AROUND = re.compile(r"<\|(?:START|END)_RESPONSE\|>")


def without_thought(text: str) -> str | None:
    r"""Return an answer without what was thought before it.

    Args:
        text: what a model wrote, with the marks of its thoughts. Of a thought that the prompt
            opened the first mark may be missing, where its end begins the text or ends a line.

    Returns:
        The answer; None where the text ends inside a thought. Marks further on, which an answer may
        speak of, are left alone.

    Examples:
        >>> without_thought("<think>\nHm.\n</think>\n\nI can't.")
        "I can't."
        >>> without_thought("Hm. </think>\nI can't."), without_thought("<think>\nHm. Let me")
        ("I can't.", None)
    """
    for thought, answer in _CHANNELS:
        if text.lstrip("\n").startswith(thought) or answer.match(text):
            found = answer.search(text)
            if found is None:
                return None
            text = text[found.end() :]
    for start, end in _BLOCKS:
        head, mark, tail = text.partition(end)
        at_a_line_s_end = not head.strip() or not tail.lstrip(" ") or tail.lstrip(" ")[0] == "\n"
        if mark and start not in head and at_a_line_s_end:
            text = tail.lstrip()
        while text.lstrip().startswith(start):
            _, mark, after = text.partition(end)
            if not mark:
                return None
            text = after.lstrip()
    return _AROUND.sub("", text)


def opened_thought(prompt: str) -> str:
    r"""Return the mark of the thought that a rendered prompt ends in; "" where there is none.

    Examples:
        >>> opened_thought("<|im_start|>assistant\n<think>\n"), opened_thought("A <think> tag.")
        ('<think>', '')
    """
    end = prompt.rstrip()
    return next((start for start, _ in _BLOCKS if end.endswith(start)), "")


def has_marks(text: str) -> bool:
    """Tell whether a text may have a mark of a thought or of a channel."""
    channels = ("<|channel|>", " to=self<|message|>", " to=user<|message|>", "_RESPONSE|>")
    return any(mark in text for mark in (*channels, *(m for pair in _BLOCKS for m in pair)))
