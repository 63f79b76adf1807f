"""Render conversations with a chat template; check that nothing is lost; find an answer's start.

A template may drop content that it does not expect (such as plain strings instead of lists of
parts), and its generation prompt may end inside a thought or before a channel. Both are detected
from the rendered text, never from the template's name.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError

_ANSWER = "Kestrel-4127"  # a placeholder for an answer; no template contains or trims it
NOT_OF_TEMPLATES = ("tokenize", "add_generation_prompt", "continue_final_message", "return_dict")
"""Options of apply_chat_template itself, which `chat_template_kwargs` must not set."""
_NEED = (
    "pass `chat_template_kwargs`, such as {'enable_thinking': False}, or `answer_start`, the text "
    "that leads from there to the answer, such as '</think>\\n\\n'"
)


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """Render a conversation, and check that the text contains every message.

    Args:
        tokenizer: with a chat template.
        messages: role and content of each turn. If the template drops a content that is a string,
            it is passed as a list of parts instead.
        options: of `apply_chat_template`: add_generation_prompt and the template's own options.

    Returns:
        The text, with the template's special tokens.

    Raises:
        ValueError: there is no template, it raises, or it drops the content of a message.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("`tokenizer` must have a chat template to render a conversation")
    plain = [dict(message) for message in messages]
    in_parts = [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in plain
    ]
    reasons: list[ValueError] = []
    for form in (plain, in_parts, _with_arguments_as_text(plain)):
        if form is None:
            continue
        try:
            text: str = tokenizer.apply_chat_template(form, tokenize=False, **options)
        except (TemplateError, TypeError, LookupError) as error:
            reason = f"must render the conversation; its chat template raises: {error}"
        else:
            lost = next((m for m in plain if not _is_in(m, text)), None)
            if lost is None:
                return text
            what = "tool_calls" if lost.get("tool_calls") else "content"
            reason = (
                "must render what each message says; its chat template leaves out the "
                f"{what} of the {lost['role']}"
            )
        reasons.append(ValueError(f"`tokenizer` {reason}"))
    raise reasons[0]  # the reason for the conversation as it was given


def render_prompts(tokenizer: Any, prompts: Sequence[str], **options: Any) -> list[str]:
    """Render each question with the generation prompt, up to where the model begins to write."""
    return [
        render(tokenizer, [_user(prompt)], add_generation_prompt=True, **options)
        for prompt in prompts
    ]


def render_answer_starts(
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    answer_start: str | None = None,
) -> list[str]:
    """Render each question up to where its answer begins, which may be after a thought.

    Args:
        tokenizer: with a chat template.
        prompts: the questions.
        chat_template_kwargs: of the template, such as {"enable_thinking": False}.
        answer_start: the text between the generation prompt and the answer. None means the text
            that the template itself puts there in a finished conversation: a closed thought, the
            opening of the final channel, or most often nothing.

    Returns:
        The texts, with the template's special tokens.

    Raises:
        ValueError: the generation prompt opens something (such as a thought) that is not in a
            finished answer of this template; or as in `render`.
    """
    options = dict(chat_template_kwargs or {})
    for name in NOT_OF_TEMPLATES:
        if name in options:
            raise ValueError(
                f"`chat_template_kwargs` must be options of the template; got {name!r}"
            )
    asked = render_prompts(tokenizer, prompts, **options)
    if answer_start is not None:
        return [text + answer_start for text in asked]
    return [
        _up_to_answer(tokenizer, prompt, text, options)
        for prompt, text in zip(prompts, asked, strict=True)
    ]


def _up_to_answer(tokenizer: Any, prompt: str, asked: str, options: dict[str, Any]) -> str:
    answer = {"role": "assistant", "content": _ANSWER}
    finished = render(tokenizer, [_user(prompt), answer], **options)
    upto = finished[: finished.rindex(_ANSWER)]
    # rstrip: the prompt may end in "<think>\n" where a finished answer has "<think></think>"
    if upto.startswith(asked.rstrip()):
        # a blank before the answer belongs to the answer's first token
        return asked if upto.rstrip(" ") == asked else upto.rstrip(" ")
    same = (one == other for one, other in zip(asked, upto, strict=False))
    opened = asked[sum(itertools.takewhile(bool, same)) :]
    raise ValueError(
        f"`tokenizer` must render where an answer begins; its generation prompt opens {opened!r}, "
        f"which a finished answer of its chat template has not: {_NEED}"
    )


def _user(prompt: str) -> dict[str, str]:
    return {"role": "user", "content": prompt}


def _with_arguments_as_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Return the messages with tool calls' arguments as JSON text, which some templates need."""
    if not any(message.get("tool_calls") for message in messages):
        return None
    made = []
    for message in messages:
        calls = [
            {**call, "function": {**call["function"], "arguments": json.dumps(arguments)}}
            if isinstance(arguments := call.get("function", {}).get("arguments"), dict)
            else call
            for call in message.get("tool_calls") or ()
        ]
        made.append({**message, "tool_calls": calls} if calls else message)
    return made


def _is_in(message: Mapping[str, Any], text: str) -> bool:
    """Tell whether a text contains a message, which templates may trim and strip of its thought."""
    for call in message.get("tool_calls") or ():
        if str(call.get("function", call).get("name")) not in text:
            return False
    content = message.get("content")
    if not isinstance(content, str) or message.get("role") not in ("system", "user", "assistant"):
        return True
    return content.rpartition("</think>")[2].strip() in text
