"""docs/troubleshooting.md is made of messages that are in the code, and is up to date."""

from __future__ import annotations

import ast
import re

import pytest
import troubleshooting
import typer
from troubleshooting import Entry, Message

from str_kernels.cli import app

ENTRIES = troubleshooting.entries()


@pytest.fixture(scope="module")
def messages() -> list[Message]:
    return troubleshooting.messages()


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry.words for entry in ENTRIES])
def test_the_words_are_in_a_message(entry: Entry, messages: list[Message]) -> None:
    assert troubleshooting.matching(entry, messages), "no message of the code has these words"


def test_words_that_are_in_no_message_are_not_found(messages: list[Message]) -> None:
    assert not troubleshooting.matching(Entry("", "`model` must be purple", "", ""), messages)
    assert not troubleshooting.matching(Entry("", "must be", "", ""), messages)  # too few


def test_the_page_is_what_make_docs_writes() -> None:
    page = troubleshooting.PAGE.read_text(encoding="utf-8")
    assert page == troubleshooting.page(), "run `make docs`"


def test_each_message_is_there_once() -> None:
    words = [entry.words for entry in ENTRIES]
    assert sorted(set(words)) == sorted(words)


def test_options_that_a_remedy_names_exist() -> None:
    pytest.importorskip("trl")  # whose options are finetune's too
    from str_kernels.integrations.finetune.options import ALIASES

    known = {"--debug", *_options(typer.main.get_command(app))}
    known |= {"--" + alias.replace("_", "-") for alias in ALIASES}
    for entry in ENTRIES:
        named = set(re.findall(r"`(--[\w-]+)", entry.remedy)) - {"--no-deps"}
        assert named <= known, entry.words


def _options(command: object) -> list[str]:
    inner = getattr(command, "commands", {}).values()
    own = [name for parameter in getattr(command, "params", ()) for name in parameter.opts]
    return own + [name for one in inner for name in _options(one)]


def test_messages_of_every_form_are_read() -> None:
    source = """
raise ValueError("`a` must be 1; " f"got {a}")
raise torch.OutOfMemoryError(f"none left: {error}")
warnings.warn("look out", stacklevel=2)
raise _refusal("linear", f"be {what}")
def reason_against_it():
    return f"have no {thing}"
raise TypeError(said)
raise
"""
    assert set(troubleshooting._messages_in(ast.parse(source))) == {
        Message("ValueError", "`a` must be 1; got ..."),
        Message("ValueError", "`model` must have no ..."),
        Message("OutOfMemoryError", "none left: ..."),
        Message("UserWarning", "look out"),
        Message("ValueError", "`model` must be ..."),
    }
