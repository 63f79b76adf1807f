"""Additions to `mkdocs build`: pages made from the repository, and links that lead out of docs/.

On a repository's page a link to ../bench/results/study.csv works as it is. The site has its own
copy of each such file, in the folder `repository`; a link to a folder becomes plain text there.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "README.md": "index.md",  # what it says at more length is here
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_SETTINGS = "<!-- the fields of SafetySettings -->"
_FIGURE = re.compile(r'(<img [^>]*src="([^"]+\.png)"[^>]*>)')
_FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def on_config(config: Any) -> Any:
    """Leave out of the navigation the pages whose files are not in the repository."""
    absent = {page for name, page in PAGES.items() if not (ROOT / name).exists()}
    config.nav = _without(config.nav, absent)
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made here, and the files of the repository that pages link to."""
    made = {"api/command-line.md": commands.page()}
    for name, page in PAGES.items():
        if page != "index.md" and (ROOT / name).exists():
            made[page] = relink((ROOT / name).read_text("utf-8"), name, page, files, config)
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point a page's links out of docs/ at the copies in the site."""
    if page.file.abs_src_path is None:  # made above, with its links
        return markdown
    here = page.file.src_uri
    if here == "troubleshooting.md":  # who types a message wants this page
        page.meta.setdefault("search", {"boost": 4})
    markdown = markdown.replace(_SETTINGS, commands.settings())
    return relink(markdown, f"docs/{here}", here, files, config)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Let each figure be opened by itself, at its full size."""
    return _FIGURE.sub(r'<a class="figure" href="\2">\1</a>', html)


def relink(text: str, source: str, page: str, files: Files, config: Any) -> str:
    """Return the text of the file `source` with its links as they are from `page`."""

    def replace(match: re.Match[str]) -> str:
        picture, shown, link, anchor = match.groups()
        if "://" in link or link.startswith(("/", "mailto:")):
            return match[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        path = ROOT / there
        if there in PAGES:
            target = PAGES[there]
        elif there.startswith("docs/"):
            target = there.removeprefix("docs/")
        elif path.is_dir():
            return shown
        elif path.is_file():
            target = f"repository/{there}"
            if files.get_file_from_path(target) is None:
                files.append(File.generated(config, target, abs_src_path=str(path)))
        else:
            return match[0]  # which mkdocs warns of
        return f"{picture}[{shown}]({_from(page, target)}{anchor or ''})"

    return _outside_code(text, lambda part: _LINK.sub(replace, part))


def _from(page: str, target: str) -> str:
    return posixpath.relpath(target, posixpath.dirname(page) or ".")


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    parts = _FENCE.split(text)  # every other part is a block of code
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


def _without(nav: list[Any], absent: set[str]) -> list[Any]:
    kept: list[Any] = []
    for entry in nav:
        if isinstance(entry, str):
            kept += [entry] * (entry not in absent)
            continue
        ((title, inside),) = entry.items()
        if isinstance(inside, list):
            kept.append({title: _without(inside, absent)})
        elif inside not in absent:
            kept.append(entry)
    return kept
