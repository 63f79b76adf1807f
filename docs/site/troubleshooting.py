"""Write docs/troubleshooting.md: the package's own messages, each with its cause and remedy.

`make docs` runs this. The messages are read off the code; which of them are on the page, and what
is said of each, is in messages.toml. tests/integrations/pages/test_troubleshooting.py fails where
the page is not what this makes, or where words in messages.toml are in no message any more.
"""

from __future__ import annotations

import ast
import re
import textwrap
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
ENTRIES = HERE / "messages.toml"
FOLDERS = ("str_kernels", "integrations")

_PLACES = {"_refusal": 1}  # which argument is the message; the first, of all others
_SHORTEST = 12  # letters: fewer words are in too many messages
_INTRODUCTION = """# Troubleshooting

<!-- Written by `make docs` from the messages in the code and docs/site/messages.toml. -->

Search this page for words of your message; `...` stands for a value that is in it. A message about
an argument has the form "`argument` must (rule); got (value)". On the command line it names the
option instead: `--output` and not `output`. `str-kernels --debug COMMAND` shows where in the code
an error comes from.

When nothing here helps, `str-kernels doctor` prints the versions and devices that a report needs.
"""


class Message(NamedTuple):
    """What an error or a warning says, with ... for the values in it."""

    kind: str  # ValueError, UserWarning and so on
    text: str


class Entry(NamedTuple):
    """One message of the page."""

    section: str
    words: str  # in the message, whatever its values
    cause: str
    remedy: str


def messages() -> list[Message]:
    """Return every error and warning of the package whose text is in the code."""
    found: dict[Message, None] = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if (ROOT / folder / "integrations") not in path.parents:  # a link to the other folder
                found |= dict.fromkeys(_messages_in(ast.parse(path.read_text("utf-8"))))
    return list(found)


def entries() -> list[Entry]:
    """Return what messages.toml says, in its order."""
    table = tomllib.loads(ENTRIES.read_text("utf-8"))
    return [Entry(section, **row) for section, rows in table.items() for row in rows]


def matching(entry: Entry, of: Sequence[Message]) -> list[Message]:
    """Return the messages that have an entry's words."""
    if len(entry.words) < _SHORTEST:
        return []
    return [message for message in of if entry.words in message.text]


def page() -> str:
    """Return the whole page."""
    known = messages()
    parts, section = [_INTRODUCTION.strip()], ""
    for entry in entries():
        if entry.section != section:
            section = entry.section
            parts.append(f"## {section}")
        shown = matching(entry, known)
        parts.append(f"### {_first_words(shown[0].text)}")
        for message in shown:
            lines = textwrap.wrap(f"{message.kind}: {message.text}", 100)
            parts.append("\n".join(["```text", *lines, "```"]))
        parts.append(f"**Cause.** {entry.cause.strip()}")
        parts.append(f"**What to do.** {entry.remedy.strip()}")
    return "\n\n".join(parts) + "\n"


def _first_words(text: str) -> str:
    return re.split(r"; |(?<!'): |(?<!\.)\. | \(", text)[0]


def _messages_in(tree: ast.Module) -> Iterator[Message]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and "reason_against" in node.name:
            yield from _reasons_in(node)
        if not isinstance(node, ast.Call | ast.Raise):
            continue
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call):
            continue
        name = ast.unparse(call.func)
        if name == "warnings.warn":
            kind, place = "UserWarning", 0
        elif isinstance(node, ast.Raise):
            kind, place = name, _PLACES.get(name, 0)
        else:
            continue
        text = _text(call.args[place]) if len(call.args) > place else None
        if text is None:
            continue
        if name == "_refusal":
            kind, text = "ValueError", f"`model` must {text}"
        text = re.sub(r"\.\.\.[ .]*\.\.\.", "...", re.sub(r"\s+", " ", text))
        yield Message(kind.rpartition(".")[2], text)


def _reasons_in(function: ast.FunctionDef) -> Iterator[Message]:
    """Yield what it may return: the rule that a refused model must keep."""
    for node in ast.walk(function):
        if isinstance(node, ast.Return) and node.value is not None:
            text = _text(node.value)
            if text:
                yield Message("ValueError", f"`model` must {text}")


def _text(node: ast.expr) -> str | None:
    """Return a message with ... for its values, or None where it is not written there."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "..." for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (_text(node.left) or "...") + (_text(node.right) or "...")
    return None


if __name__ == "__main__":
    text = page()
    if not PAGE.exists() or PAGE.read_text("utf-8") != text:
        PAGE.write_text(text, encoding="utf-8")
        print(f"wrote {PAGE.relative_to(ROOT)}")
