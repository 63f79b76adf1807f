"""A report's blocks as one HTML file that asks for nothing: no script, no link, pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from ...evals import as_html
from .document import Block, Heading, Paragraph, Picture

# What is in the file may come from a model: even if an escape were missing, nothing could run.
CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff; }
h1, h2, h3 { line-height: 1.2; margin-top: 2rem; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem; }
th, td { border: 1px solid #ccc; padding: 0.3rem 0.6rem; text-align: left; vertical-align: top;
  unicode-bidi: isolate; overflow-wrap: anywhere; }
th { background: #f2f2f2; }
.number { text-align: right; white-space: nowrap; }
.limit { border-left: 4px solid #E69F00; padding-left: 0.8rem; color: #555; font-size: 0.9rem; }
.wide { overflow-x: auto; }
img { max-width: 100%; height: auto; }
"""


def to_html(blocks: Sequence[Block], folder: Path) -> str:
    """Return the blocks as one HTML document, all text in them taken literally.

    Args:
        blocks: the first heading is the title.
        folder: where the PNG files of the pictures are; their bytes go into the document.

    Returns:
        The document; with its content security policy nothing in it can run or be fetched.
    """
    title = next((block.text for block in blocks if isinstance(block, Heading)), "report")
    body = "\n".join(_html(block, folder) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{as_html(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block, folder: Path) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{as_html(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        name = ' class="limit"' if block.is_limit else ""
        return f"<p{name}>{as_html(block.text)}</p>"
    if isinstance(block, Picture):
        data = base64.b64encode((folder / block.file).read_bytes()).decode("ascii")
        return f'<p><img alt="{as_html(block.text)}" src="data:image/png;base64,{data}"></p>'

    def row(cells: Sequence[str], tag: str) -> str:
        made = (
            f"<{tag}{_number_class(i >= block.numbers_from)}>{as_html(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(made)}</tr>"

    rows = "\n".join(row(cells, "td") for cells in block.rows)
    head = row(block.header, "th")
    return f'<div class="wide"><table>\n<thead>{head}</thead>\n<tbody>{rows}</tbody></table></div>'


def _number_class(is_number: bool) -> str:
    return ' class="number"' if is_number else ""
