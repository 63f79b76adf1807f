"""Training rows: conversations and plain texts, checked row by row, turned into ids and labels."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...op import IGNORE_INDEX
from .answer_spans import Span, render_with_answers
from .data_files import read_rows
from .rendering import NOT_OF_TEMPLATES

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
FORMS = (
    '{"messages": [...]}, {"prompt": ..., "completion": ...}, {"text": ...}, ShareGPT\'s '
    '{"conversations": [...]} or Alpaca\'s {"instruction": ..., "output": ...}'
)


@dataclass(frozen=True)
class Example:
    """One training row: a conversation, or a plain text with its completion.

    Attributes:
        messages: the turns, rendered by the tokenizer's chat template; None for a plain row.
        prompt: text without labels, for a plain row.
        completion: text with labels, for a plain row.
        where: file and line, for messages.
        form: the form of the row in its file.
        unlabelled: indices of the turns that get no labels even if they are the assistant's.
        tools: passed to the chat template as `tools`.
        template_options: further options of the chat template.
    """

    messages: tuple[dict[str, Any], ...] | None = None
    prompt: str = ""
    completion: str = ""
    where: str = "row"
    form: str = "messages"
    unlabelled: frozenset[int] = frozenset()
    tools: Sequence[Any] | None = None
    template_options: dict[str, Any] | None = None

    @classmethod
    def chat(cls, prompt: str, answer: str, where: str = "row") -> Example:
        """Make a conversation of one question and one answer."""
        turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
        return cls(messages=turns, where=where)

    @property
    def options(self) -> dict[str, Any]:
        """The options that the chat template gets with the messages."""
        tools = {} if self.tools is None else {"tools": list(self.tools)}
        return {**tools, **(self.template_options or {})}


class EncodedRows(NamedTuple):
    """Rows as ids and labels, and a record of the rows that were cut or left out.

    Attributes:
        rows: input_ids and labels of each row that has a label.
        where: the place of each of these rows.
        cut: number of these rows that lost their end.
        dropped: places of the rows that have no label, or none within `max_length`.
        forms: number of rows of each form.
    """

    rows: list[dict[str, list[int]]]
    where: tuple[str, ...]
    cut: int
    dropped: tuple[str, ...]
    forms: dict[str, int]

    def notes(self) -> list[str]:
        """Say which rows were converted, cut or left out, one line each."""
        made = [
            f"{count} rows are {form}'s and were made conversations"
            for form, count in self.forms.items()
            if form in ("ShareGPT", "Alpaca")
        ]
        if self.cut:
            made.append(f"{self.cut} rows lost their end, see `max_length`")
        if self.dropped:
            more = f" and {len(self.dropped) - 3} others" if len(self.dropped) > 3 else ""
            made.append(
                f"{len(self.dropped)} rows have no label and were left out: "
                f"{'; '.join(self.dropped[:3])}{more}"
            )
        return made


def read_examples(
    source: Path | str, split: str | None = None, *, name: str = "data"
) -> list[Example]:
    """Read training rows.

    A row is one of

        {"messages": [{"role": ..., "content": ...}, ...]}       every assistant turn has labels
        {"prompt": ..., "completion": ...}                       two texts, or two lists of messages
        {"text": ...}                                            every token has a label
        {"conversations": [{"from": ..., "value": ...}, ...]}    ShareGPT's
        {"instruction": ..., "input": ..., "output": ...}        Alpaca's

    A row with messages may also have "tools" and "chat_template_kwargs", for the chat template. An
    assistant turn with "weight": 0 gets no labels. Other keys are ignored.

    Args:
        source: JSON Lines, JSON, CSV, Parquet, a saved data set or the id of one on the hub.
        split: of a data set that has several; None means "train".
        name: of the argument, for messages.

    Returns:
        The rows in order.

    Raises:
        ValueError: the source cannot be read or is empty, or a row is broken; the message names
            file, line and reason.
    """
    examples = []
    for where, row in read_rows(source, split, name):
        try:
            examples.append(_parse(row, where))
        except (ValueError, TypeError, KeyError) as error:
            reason = str(error) if not isinstance(error, KeyError) else f"{error} is missing"
            raise ValueError(f"`{name}` must hold training rows; {where}: {reason}") from error
    if not examples:
        raise ValueError(f"`{name}` must hold at least one row; got none in {source}")
    return examples


def encode_rows(tokenizer: Any, examples: Iterable[Example], max_length: int | None) -> EncodedRows:
    """Turn rows into input_ids and labels; only answers and completions get labels.

    A token belongs to an answer if it ends inside the answer's characters in the rendered text
    (`render_with_answers`).

    Args:
        tokenizer: the model's; needs a chat template for rows with messages.
        examples: the rows.
        max_length: maximum length of a row, tokens; longer rows lose their end. None: no limit.

    Returns:
        The rows that have a label, and a record of the others.

    Raises:
        ValueError: the chat template is missing or cannot render a row, or no row has a label; the
            message names the row.
    """
    rows, where, cut, dropped = [], [], 0, []
    forms: Counter[str] = Counter()
    for example in examples:
        forms[example.form] += 1
        ids, labels = _encode(tokenizer, example)
        if all(label == IGNORE_INDEX for label in labels[1:max_length]):
            dropped.append(example.where)
            continue
        cut += max_length is not None and len(ids) > max_length
        rows.append({"input_ids": ids[:max_length], "labels": labels[:max_length]})
        where.append(example.where)
    if not rows:
        first = dropped[0] if dropped else "no row"
        raise ValueError(
            "`data` must have a label in at least one row, and `max_length` must leave it; got "
            f"{max_length} for {first}" + (f" and {len(dropped) - 1} others" if dropped[1:] else "")
        )
    return EncodedRows(rows, tuple(where), cut, tuple(dropped), dict(forms))


def encode_examples(
    tokenizer: Any, examples: Iterable[Example], max_length: int | None
) -> list[dict[str, list[int]]]:
    """Return only the rows of `encode_rows`, without its record of the others."""
    return encode_rows(tokenizer, examples, max_length).rows


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Return a text's ids with the special tokens put before a text, but none after it."""
    bare = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.encode(text)
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return list(whole[: start + len(bare)])
    return list(whole)


def _encode(tokenizer: Any, example: Example) -> tuple[list[int], list[int]]:
    if example.messages is None:
        prompt = encode_prompt(tokenizer, example.prompt)
        completion = tokenizer.encode(example.completion, add_special_tokens=False)
        if tokenizer.eos_token_id is not None and completion[-1:] != [tokenizer.eos_token_id]:
            completion = [*completion, tokenizer.eos_token_id]
        return prompt + completion, [IGNORE_INDEX] * len(prompt) + completion
    if not tokenizer.chat_template:
        raise ValueError(
            f"`data` must hold plain prompt/completion rows, since the tokenizer has no chat "
            f"template; got messages in {example.where}"
        )
    try:
        text, spans = render_with_answers(tokenizer, example.messages, **example.options)
    except ValueError as error:
        raise ValueError(
            f"`data` must hold what the chat template renders; {example.where}: {error}"
        ) from error
    labelled = [span for turn, span in spans.items() if turn not in example.unlabelled]
    ids, ends = _tokens(tokenizer, text, labelled)
    labels = [IGNORE_INDEX] * len(ids)
    for place, end in enumerate(ends):
        if any(span.start < end <= span.end for span in labelled):
            labels[place] = ids[place]
    return ids, labels


def _tokens(tokenizer: Any, text: str, spans: Sequence[Span]) -> tuple[list[int], list[int]]:
    """Return a text's ids, and the character at which each token ends."""
    if tokenizer.is_fast:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(found["input_ids"]), [end for _, end in found["offset_mapping"]]
    # a slow tokenizer has no offsets: encode each piece by itself
    ids, ends = [], []
    borders = [0, *(border for span in spans for border in span), len(text)]
    for start, end in itertools.pairwise(borders):
        piece = tokenizer.encode(text[start:end], add_special_tokens=False)
        ids += piece
        ends += [end] * len(piece)
    return ids, ends


def _parse(row: Any, where: str) -> Example:
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object; got {type(row).__name__}")
    _check_text(row)
    more: dict[str, Any] = {
        "where": where,
        "tools": _list_or_json("tools", row["tools"]) if row.get("tools") else None,
        "template_options": _template_options(row.get("chat_template_kwargs")),
    }
    if "messages" in row:
        messages, unlabelled = _messages(_list_or_json("messages", row["messages"]))
        return Example(messages, unlabelled=unlabelled, **more)
    if "conversations" in row:
        said = _list_or_json("conversations", row["conversations"])
        turns = [_from_sharegpt(turn) for turn in said]
        if row.get("system"):
            turns.insert(0, {"role": "system", "content": row["system"]})
        messages, unlabelled = _messages(turns)
        return Example(messages, form="ShareGPT", unlabelled=unlabelled, **more)
    if "instruction" in row and "output" in row:
        messages, unlabelled = _messages(_from_alpaca(row))
        return Example(messages, form="Alpaca", **more)
    if "prompt" in row and "completion" in row:
        return _prompt_and_completion(row["prompt"], row["completion"], more)
    if isinstance(row.get("text"), str):
        if not row["text"]:
            raise ValueError('"text" must not be empty')
        return Example(completion=row["text"], where=where, form="text")
    if "chosen" in row:
        raise ValueError('"chosen" and "rejected" are preferences; make rows of the chosen answers')
    raise ValueError(f"a row must be {FORMS}; got the keys {sorted(row)}")


def _prompt_and_completion(prompt: Any, completion: Any, more: dict[str, Any]) -> Example:
    form = "prompt and completion"
    if isinstance(prompt, list) and isinstance(completion, list):
        messages, unlabelled = _messages([*prompt, *completion])
        return Example(
            messages, form=form, unlabelled=unlabelled | frozenset(range(len(prompt))), **more
        )
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str):
            raise ValueError(f'"{name}" must be a string; got {type(value).__name__}')
    if not completion:
        raise ValueError('"completion" must not be empty')
    return Example(prompt=prompt, completion=completion, where=more["where"], form=form)


def _messages(turns: Any) -> tuple[tuple[dict[str, Any], ...], frozenset[int]]:
    """Return the turns in the form that templates take, and the indices of unlabelled ones."""
    if not isinstance(turns, list) or not turns:
        raise ValueError('"messages" must be a list with at least one turn')
    messages, unlabelled = [], set()
    for place, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("role") not in _ROLES:
            raise ValueError(f'each message must have a "role" of {", ".join(_ROLES)}')
        weight = turn.get("weight", 1)
        if weight not in (0, 1):
            raise ValueError(f'"weight" must be 0 or 1; got {weight!r}')
        if weight == 0:
            unlabelled.add(place)
        kept = {key: v for key, v in turn.items() if key != "weight" and v is not None}
        _check_calls(kept.get("tool_calls", []))
        messages.append({**kept, "content": _content(turn)})
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError('"messages" must have an assistant turn to learn from')
    return tuple(messages), frozenset(unlabelled)


def _content(turn: dict[str, Any]) -> str:
    content = turn.get("content")
    if content is None and turn.get("tool_calls"):
        return ""
    if isinstance(content, list):
        texts = []
        for part in content:
            kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
            if kind not in ("text", "str"):
                raise ValueError(f'"content" must be text, or parts of text alone; got a {kind}')
            texts.append(part["text"] if isinstance(part, dict) else part)
        content = "".join(texts)
    if not isinstance(content, str):
        raise ValueError('each message must have a "content" that is a string or a list of parts')
    return content


def _from_sharegpt(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise ValueError('each of "conversations" must be an object with "from" and "value"')
    who, said = turn["from"], turn["value"]
    kept = {"weight": turn["weight"]} if turn.get("weight") is not None else {}
    if who == "function_call":
        call = {"type": "function", "function": json.loads(said)}
        return {**kept, "role": "assistant", "content": "", "tool_calls": [call]}
    if who not in _SHAREGPT_ROLES:
        raise ValueError(f'"from" must be one of {", ".join(_SHAREGPT_ROLES)}; got {who!r}')
    return {**kept, "role": _SHAREGPT_ROLES[who], "content": said}


def _from_alpaca(row: dict[str, Any]) -> list[dict[str, Any]]:
    turns = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    history = _list_or_json("history", row.get("history") or [])
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError('"history" must be a list of pairs, question and answer')
    said = [*history, ("\n\n".join(filter(None, _asked(row))), row["output"])]
    for question, answer in said:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return turns


def _asked(row: dict[str, Any]) -> tuple[str, str]:
    return row["instruction"], row.get("input") or ""


def _list_or_json(name: str, value: Any) -> Any:
    """Return a list, which tables and CSV files may hold as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f'"{name}" must be a list or its JSON: {error}') from error
    if not isinstance(value, list):
        raise ValueError(f'"{name}" must be a list; got {type(value).__name__}')
    return value


def _template_options(value: Any) -> dict[str, Any] | None:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f'"chat_template_kwargs" must be an object; got {type(value).__name__}')
    for name in value or ():
        if name in NOT_OF_TEMPLATES:
            raise ValueError(
                f'"chat_template_kwargs" must be options of the template; got {name!r}'
            )
    return value


def _check_calls(calls: Any) -> None:
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError('"tool_calls" must be a list of {"function": {"name": ...}}')


def _check_text(row: dict[str, Any]) -> None:
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:  # JSON may contain a lone surrogate
        half = error.object[error.start : error.end]
        raise ValueError(f"{half!r} is half of a character (a lone surrogate)") from error
