"""Where the assistant's answers are in a rendered conversation, as character spans.

If a template marks them ({% generation %}), its marks are used. Otherwise an answer is found by
comparing two renderings: the turns before it with the generation prompt, and the turns up to and
including it. A template may render a turn differently when others follow (it drops thoughts, or
gives the last answer an empty one), or refuse a part of a conversation. Then the conversation is
rendered once more with a mark in place of the answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .rendering import render

_MARK = "Kestrel-4127-Fulmar"  # replaces an answer; no template contains or trims it
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Span(NamedTuple):
    """The characters text[start:end]."""

    start: int
    end: int


def render_with_answers(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any
) -> tuple[str, dict[int, Span]]:
    """Render a conversation and find its answers.

    Args:
        tokenizer: with a chat template.
        messages: the conversation, as in `render`.
        options: of `render`, such as tools and the template's own options.

    Returns:
        The text, and the span of every assistant turn, by the turn's index in `messages`. A span
        is all that a model writes after the generation prompt, including the end of the turn.

    Raises:
        ValueError: as in `render`, or an answer is not found in the rendered text.
    """
    text = render(tokenizer, messages, **options)
    turns = [place for place, turn in enumerate(messages) if turn.get("role") == "assistant"]
    marked = _by_marks(tokenizer, messages, text, options)
    if marked is not None and len(marked) == len(turns):
        return text, dict(zip(turns, marked, strict=True))
    rendering = _Rendering(tokenizer, list(messages), text, options)
    spans: dict[int, Span] = {}
    after = 0
    for turn in turns:
        spans[turn] = rendering.span(turn, after)
        after = spans[turn].end
    return text, spans


class _Rendering:
    """A rendered conversation, of which parts can be rendered to find the answers."""

    def __init__(
        self, tokenizer: Any, messages: list[Mapping[str, Any]], text: str, options: dict[str, Any]
    ) -> None:
        self.tokenizer = tokenizer
        self.messages = messages
        self.text = text
        self.options = options

    def span(self, turn: int, after: int) -> Span:
        """Return the span of an answer that begins at `after` or later."""
        before = self._try(self.messages[:turn], add_generation_prompt=True)
        upto = self._try(self.messages[: turn + 1])
        if before is not None and upto is not None:
            start, end = _common(before, self.text), _common(upto, self.text)
            # Both parts must be prefixes of the text. A generation prompt that is not one (it may
            # open a thought) still serves as the answer's header below.
            whole = start == len(before) and end == len(upto)
            if whole and after <= start < end:
                return Span(start, end)
        content = self._content(turn, after)
        start = self._start(turn, after, content, before)
        return Span(start, self._end(turn, content, upto))

    def _content(self, turn: int, after: int) -> Span:
        """Return the span of the answer's own words: what the mark would replace."""
        message = self.messages[turn]
        marked = [*self.messages]
        marked[turn] = {**message, "content": _MARK}
        other = self._try(marked)
        said = message.get("content") or ""
        if other is not None and other.count(_MARK) == 1:
            head, tail = other.split(_MARK)
            start, rest = _common(head, self.text), _common(tail[::-1], self.text[::-1])
            found = Span(start, max(start, len(self.text) - rest))
            words = said.rpartition("</think>")[2].strip() if isinstance(said, str) else ""
            if after <= found.start <= found.end and (found.start < found.end or not words):
                # a template that inspects the answer may render the text around a mark differently
                if not words or words in self.text[found.start : found.end]:
                    return found
                place = self.text.find(words, after)
                if place >= 0:
                    return Span(place, place + len(words))
        raise ValueError(
            f"`messages` must have answers that are found in what the chat template renders; "
            f"turn {turn + 1} is not"
        )

    def _start(self, turn: int, after: int, content: Span, before: str | None) -> int:
        """Return where the model begins to write: after the generation prompt."""
        if before is None:
            return content.start
        same = _common(before, self.text)
        bare = self._try(self.messages[:turn]) if turn else ""
        if bare is not None and before.startswith(bare) and bare != before:
            header = before[len(bare) :]
            if same >= len(bare) and same > after:
                return min(same, content.start)
            # earlier turns are rendered differently: find the header, or its beginning, last before
            # the answer
            for length in range(len(header), 0, -1):
                place = self.text.rfind(header[:length], after, content.start)
                if place >= 0 and header[:length].strip():
                    return min(place + length, content.start)
        return content.start

    def _end(self, turn: int, content: Span, upto: str | None) -> int:
        """Return where the turn ends, including the template's end-of-turn tokens."""
        if turn == len(self.messages) - 1:
            return len(self.text)
        if upto is not None and self.text.startswith(upto):
            return len(upto)
        # what closes the last answer usually closes every other one
        last = self.messages[-1].get("content")
        if self.messages[-1].get("role") == "assistant" and isinstance(last, str) and last.strip():
            closing = self.text.rpartition(last.strip())[2]
            place = self.text.find(closing, content.end)
            if closing and (place == content.end or self.messages[turn].get("tool_calls")):
                return place + len(closing)
        # if not, the last answer has an end of its own
        return content.end if upto is None else max(content.end, _common(upto, self.text))

    def _try(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> str | None:
        """Render a part of the conversation, or return None if the template refuses it."""
        try:
            return render(self.tokenizer, messages, **self.options, **more)
        except (ValueError, IndexError, TypeError):  # some templates index into an empty list
            return None


def _by_marks(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], text: str, options: dict[str, Any]
) -> list[Span] | None:
    """Return the spans that the template itself marks, or None if it marks none."""
    if not _GENERATION.search(_template(tokenizer)):
        return None
    found = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        **options,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    spans: list[Span] = []
    inside = False
    for taken, (start, end) in zip(found["assistant_masks"], found["offset_mapping"], strict=True):
        if taken and inside:
            spans[-1] = Span(spans[-1].start, end)
        elif taken:
            spans.append(Span(start, end))
        inside = bool(taken)
    return spans if spans and spans[-1].end <= len(text) else None


def _template(tokenizer: Any) -> str:
    template = tokenizer.chat_template
    return template if isinstance(template, str) else ""


def _common(one: str, other: str) -> int:
    """Return the length of the common prefix of two texts."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while low < high - 1:
        middle = (low + high) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle
    return low
