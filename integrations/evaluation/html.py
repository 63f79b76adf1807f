"""A report's blocks as one HTML file that asks for nothing: no script, no link, pictures inside."""

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
    finalize=lambda value: printable(str(value)),  # of every value, before it is escaped
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def to_html(blocks: Sequence[Block], folder: Path) -> str:
    """Return the blocks as one HTML document, all text in them taken literally.

    Args:
        blocks: the first heading is the title.
        folder: where the PNG files of the pictures are; their bytes go into the document.

    Returns:
        The document; with its content security policy nothing in it can run or be fetched.
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
