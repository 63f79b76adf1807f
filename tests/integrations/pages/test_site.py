"""The documentation builds, its links lead somewhere, and nothing is loaded from outside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from doc_blocks import ROOT

pytest.importorskip("mkdocs", reason="the extra docs")
pytestmark = pytest.mark.slow  # half a minute

# What a browser fetches by itself; the href of an <a> is not.
LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("link", "href"), ("source", "src")}
ELSEWHERE = re.compile(r"(https?:)?//")


class Page(HTMLParser):
    """The ids, links and loaded files of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if value is None:
                continue
            if name == "id" or (tag == "a" and name == "name"):
                self.ids.add(value)
            elif (tag, name) == ("a", "href"):
                self.links.add(value)
            elif (tag, name) in LOADED:
                self.loaded.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(  # a proxy that answers nothing stands for a machine without a network
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "https_proxy": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    # 404.html is for a server, whose addresses begin at its root
    paths = (path for path in site.rglob("*.html") if path.name != "404.html")
    return {path: Page(path.read_text("utf-8")) for path in paths}


def test_every_page_is_there(pages: dict[Path, Page], site: Path) -> None:
    built = {str(path.relative_to(site)) for path in pages}
    written = {str(path.relative_to(ROOT / "docs")) for path in ROOT.glob("docs/**/*.md")}
    made = {"changelog.md", "contributing.md", "api/command-line.md"}
    assert {re.sub(r"md$", "html", page) for page in written | made} <= built


def test_nothing_is_loaded_from_outside(pages: dict[Path, Page], site: Path) -> None:
    for path, page in pages.items():
        assert not [address for address in page.loaded if ELSEWHERE.match(address)], path
        text = path.read_text("utf-8")
        assert 'class="mermaid"' not in text, "the theme loads mermaid from another host"
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", path.read_text("utf-8")), path


def test_every_link_leads_somewhere(pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        for address in page.links | page.loaded:
            if ELSEWHERE.match(address) or address.startswith(("mailto:", "data:", "javascript:")):
                continue
            name, anchor = urldefrag(address)
            there = (path.parent / unquote(name)).resolve() if name else path
            if there.is_dir():
                there /= "index.html"
            lost = not there.exists()
            if anchor and there in pages and unquote(anchor) not in pages[there].ids:
                lost = True
            if lost:
                broken.append(f"{path.name}: {address}")
    assert broken == []


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("api/attach.html", "ref_model"),
        ("api/command-line.html", "--eval-refusals"),
        ("changelog.html", "Numerics"),
        ("search/search_index.js", "safety_linear_cross_entropy"),
    ],
)
def test_what_is_made_of_the_code_is_there(site: Path, page: str, words: str) -> None:
    assert words in (site / page).read_text("utf-8")
