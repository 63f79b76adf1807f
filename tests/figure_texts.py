"""What a figure has to read: its texts, and whether they stand apart."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import combinations
from unittest.mock import patch

from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

_APART = 1.0  # pixels by which boxes may overlap: they have a margin around their letters


@contextlib.contextmanager
def drawn_texts() -> Iterator[list[str]]:
    """Yield the texts of all figures saved inside; texts on one another or cut off fail."""
    every: list[str] = []
    boxes: dict[Text, Bbox] = {}
    draw, save = Text.draw, Figure.savefig

    def drawn(text: Text, renderer: object) -> None:
        draw(text, renderer)
        if text.get_visible() and text.get_text().strip():
            boxes[text] = text.get_window_extent()  # a layout draws twice: the last counts

    def saved(figure: Figure, *arguments: object, **options: object) -> None:
        boxes.clear()
        save(figure, *arguments, **options)
        width, height = figure.get_size_inches() * options["dpi"]
        for text, box in boxes.items():
            inside = -_APART < box.x0 and box.x1 < width + _APART
            inside = inside and -_APART < box.y0 and box.y1 < height + _APART
            assert inside, f"{text.get_text()!r} is cut off at {box}"
        for (one, first), (other, second) in combinations(boxes.items(), 2):
            apart = not first.padded(-_APART).overlaps(second.padded(-_APART))
            assert apart, f"{one.get_text()!r} is on {other.get_text()!r}"
        every.extend(text.get_text() for text in boxes)

    with patch.object(Text, "draw", drawn), patch.object(Figure, "savefig", saved):
        yield every
