"""A report as blocks, from which Markdown and HTML are made, with escaping in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...evals import as_markdown


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the title."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Running text, which starts with our own word, not quoted text; limits are set apart."""

    text: str
    is_limit: bool = False


@dataclass(frozen=True)
class Table:
    """Header and rows of cells; columns from `numbers_from` on are aligned right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers_from: int = 1


@dataclass(frozen=True)
class Picture:
    """A PNG file beside the report."""

    file: str
    text: str


Block = Heading | Paragraph | Table | Picture


def to_markdown(blocks: Sequence[Block]) -> str:
    """Return the blocks as GitHub-flavoured Markdown, with all their text escaped."""
    return "\n".join(_markdown(block) for block in blocks)


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {as_markdown(block.text)}\n"
    if isinstance(block, Paragraph):
        return f"{'> ' if block.is_limit else ''}{as_markdown(block.text)}\n"
    if isinstance(block, Picture):
        return f"![{as_markdown(block.text)}]({block.file})\n"
    rule = ["---" if i < block.numbers_from else "---:" for i in range(len(block.header))]
    lines = [[as_markdown(cell) for cell in row] for row in (block.header, *block.rows)]
    lines.insert(1, rule)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
