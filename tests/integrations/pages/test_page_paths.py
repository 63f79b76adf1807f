"""The files and tests that a page names are there."""

from __future__ import annotations

import re

import pytest
from doc_blocks import ROOT

DOCS = {str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md")}
PAGES = sorted({"README.md", "CONTRIBUTING.md", *DOCS} - {"docs/log.md"})  # the log is of its day
FOLDERS = "str_kernels|integrations|bench|tests|docs|findings|examples"
PATH = re.compile(rf"\b(?:{FOLDERS})/[\w./-]+\.(?:py|csv|toml|md|sh|png)")
TEST = re.compile(r"(tests/[\w./-]+\.py)::(\w+)")


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    # an sdist has the folder integrations/ inside of str_kernels/ alone
    places = (ROOT, ROOT / "str_kernels")
    missing = [
        path for path in PATH.findall(text) if not any((place / path).exists() for place in places)
    ]
    assert missing == []
    for path, name in TEST.findall(text):
        assert f"def {name}(" in (ROOT / path).read_text("utf-8"), name


def test_a_path_that_is_not_there_is_seen() -> None:
    named = PATH.findall("see `str_kernels/rows_triton.py`, and a.py")
    assert named == ["str_kernels/rows_triton.py"] and not (ROOT / named[0]).exists()
