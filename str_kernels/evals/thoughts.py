"""Recognise and remove the thoughts before an answer, as chat templates mark them."""

from __future__ import annotations

import re

# Marks of the templates in TRL's package, and Cohere's. A block has a start and an end mark. A
# channel of thoughts has a start mark, and ends where the answer's channel starts.
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
    r"""Return an answer without the thoughts before it.

    Args:
        text: a model's output, with the marks of its thoughts. The start mark may be missing, if
            the prompt ended with it; the end mark must then begin the text or end a line.

    Returns:
        The answer, or None if the text ends inside a thought. Later marks, which an answer may
        mention, are kept.

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
    r"""Return the start mark of a thought that a rendered prompt ends with, or "".

    Examples:
        >>> opened_thought("<|im_start|>assistant\n<think>\n"), opened_thought("A <think> tag.")
        ('<think>', '')
    """
    end = prompt.rstrip()
    return next((start for start, _ in _BLOCKS if end.endswith(start)), "")


def has_marks(text: str) -> bool:
    """Return whether a text may contain a mark of a thought or of a channel."""
    channels = ("<|channel|>", " to=self<|message|>", " to=user<|message|>", "_RESPONSE|>")
    return any(mark in text for mark in (*channels, *(m for pair in _BLOCKS for m in pair)))
