"""Training rows: read from JSONL, checked line by line, cut into ids, labels on answers only."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..contracts import IGNORE_INDEX
from .chat_rendering import render

_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Example:
    """One training row: a conversation, or a plain text with its completion.

    Attributes:
        messages: role and content of each turn, rendered by the tokenizer's chat template; None
            for a plain row.
        prompt: text without a label, for a plain row.
        completion: text with labels, for a plain row.
        where: file and line, for messages.
    """

    messages: tuple[dict[str, str], ...] | None = None
    prompt: str = ""
    completion: str = ""
    where: str = "row"

    @classmethod
    def chat(cls, prompt: str, answer: str, where: str = "row") -> Example:
        """Make a conversation of one question and one answer."""
        turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
        return cls(messages=turns, where=where)


def read_examples(path: Path | str) -> list[Example]:
    """Read training rows from a JSON Lines file.

    A row is {"messages": [{"role": ..., "content": ...}, ...]} with at least one assistant turn,
    or {"prompt": ..., "completion": ...} with two strings (plain text, no chat template, as in
    TRL) or two lists of messages. Blank lines are skipped, other keys ignored.

    Args:
        path: the file.

    Returns:
        The rows in order.

    Raises:
        ValueError: the file is missing or empty, or a row is broken; the message names file, line
            and reason.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"`data` must be a readable JSONL file; got {path}: {error}") from error
    examples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            examples.append(_parse(line, where))
        except (ValueError, TypeError, KeyError) as error:
            reason = str(error) if not isinstance(error, KeyError) else f"{error} is missing"
            raise ValueError(
                f"`data` must hold training rows; {path}, line {number}: {reason}"
            ) from error
    if not examples:
        raise ValueError(f"`data` must hold at least one row; got none in {path}")
    return examples


def encode_examples(
    tokenizer: Any, examples: Iterable[Example], max_length: int
) -> list[dict[str, list[int]]]:
    """Turn rows into input_ids and labels; only assistant turns and completions carry labels.

    Args:
        tokenizer: of the model; needs a chat template for rows with messages.
        examples: the rows.
        max_length: longer rows lose their end, tokens.

    Returns:
        One dict per row with "input_ids" and "labels" of equal length.

    Raises:
        ValueError: the chat template is missing or changes earlier turns, or a row has no label
            left; the message names the row.
    """
    rows = []
    for example in examples:
        ids, labels = _encode(tokenizer, example)
        ids, labels = ids[:max_length], labels[:max_length]
        if all(label == IGNORE_INDEX for label in labels[1:]):
            raise ValueError(
                f"`max_length` must leave at least one label; got {max_length} for {example.where}"
            )
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def _encode(tokenizer: Any, example: Example) -> tuple[list[int], list[int]]:
    if example.messages is None:
        prompt = tokenizer.encode(example.prompt)
        completion = tokenizer.encode(example.completion, add_special_tokens=False)
        if tokenizer.eos_token_id is not None:
            completion = [*completion, tokenizer.eos_token_id]
        return prompt + completion, [IGNORE_INDEX] * len(prompt) + completion
    if not tokenizer.chat_template:
        raise ValueError(
            f"`data` must hold plain prompt/completion rows, since the tokenizer has no chat "
            f"template; got messages in {example.where}"
        )
    messages = list(example.messages)
    ids = _render(tokenizer, messages)
    labels = [IGNORE_INDEX] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:turn], add_generation_prompt=True)
        upto = _render(tokenizer, messages[: turn + 1])
        if ids[: len(before)] != before or ids[: len(upto)] != upto:
            raise ValueError(
                f"`data` must render turn by turn; the chat template changes earlier turns of "
                f"{example.where} when a later one follows"
            )
        labels[len(before) : len(upto)] = upto[len(before) :]
    return ids, labels


def _render(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    text = render(tokenizer, messages, **options)
    return list(tokenizer.encode(text, add_special_tokens=False))


def _parse(line: bytes, where: str) -> Example:
    row = json.loads(line.decode("utf-8"))
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object; got {type(row).__name__}")
    if "messages" in row:
        return Example(messages=_parse_messages(row["messages"]), where=where)
    if "prompt" not in row or "completion" not in row:
        raise ValueError(
            f'a row must have "messages", or "prompt" and "completion"; got {sorted(row)}'
        )
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return Example(messages=_parse_messages([*prompt, *completion]), where=where)
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str):
            raise ValueError(f'"{name}" must be a string; got {type(value).__name__}')
    if not completion:
        raise ValueError('"completion" must not be empty')
    return Example(prompt=prompt, completion=completion, where=where)


def _parse_messages(messages: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" must be a list with at least one turn')
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise ValueError(f'each message must have a "role" of {", ".join(_ROLES)}')
        if not isinstance(message.get("content"), str):
            raise ValueError('each message must have a "content" that is a string')
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError('"messages" must have an assistant turn to learn from')
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)
