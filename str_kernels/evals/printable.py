"""Make untrusted text safe to display: no hidden characters, nothing that moves the cursor."""

from __future__ import annotations

import re
import unicodedata

# Controls, formats (right-to-left overrides, joiners), surrogates, private and unassigned
# characters, and the two separators that break lines.
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
_MARKDOWN = re.compile(r"([\\`*_\[\]|~$])")


def printable(text: str) -> str:
    r"""Return a text as one line, with every invisible character written as an escape.

    Args:
        text: any string, such as a model's answer.

    Returns:
        The text with line ends as \n, escape characters as \x1b and so on. It may still contain
        markup: use as_markdown for Markdown, escape it for HTML, and pass it to rich as a Text,
        not as a string.

    Examples:
        >>> print(printable("a\nb \x1b[31mred \u202egnp.exe"))
        a\nb \x1b[31mred \u202egnp.exe
    """
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if unicodedata.category(character) in _HIDDEN
        else character
        for character in text
    )


def as_markdown(text: str) -> str:
    r"""Escape a text for the inside of a Markdown line or table cell: no markup, HTML or links.

    At the start of a line, "#" or "-" would still make a heading or a list.

    Examples:
        >>> print(as_markdown("<i>|`*x*` http://a.b"))
        &lt;i&gt;\|\`\*x\*\` http&#58;//a.b
    """
    plain = _MARKDOWN.sub(r"\\\1", printable(text))
    plain = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # GitHub turns bare URLs and names after an at sign into links
    plain = plain.replace("://", "&#58;//").replace("@", "&#64;")
    return re.sub(r"(?i)(www)\.", r"\1&#46;", plain)
