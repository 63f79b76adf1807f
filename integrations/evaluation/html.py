"""A report's blocks as one self-contained HTML file: no script, no link, pictures embedded."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ...evals import printable
from .document import Block, Heading, Picture

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    finalize=lambda value: printable(str(value)),  # runs on every value before escaping
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def to_html(blocks: Sequence[Block], folder: Path) -> str:
    """Return the blocks as one HTML document, with all their text escaped.

    Args:
        blocks: the first heading is the title.
        folder: the folder of the pictures' PNG files, which are embedded.

    Returns:
        The document. Its content security policy forbids running or fetching anything.
    """
    return _TEMPLATES.get_template("report.html.jinja2").render(
        title=next((block.text for block in blocks if isinstance(block, Heading)), "report"),
        blocks=[(type(block).__name__, block) for block in blocks],
        pictures={
            block.file: base64.b64encode((folder / block.file).read_bytes()).decode("ascii")
            for block in blocks
            if isinstance(block, Picture)
        },
    )
