"""Text of unknown origin, made safe to look at: nothing hidden, nothing that moves the cursor."""

from __future__ import annotations

import re
import unicodedata

# Controls, formats (right-to-left overrides, joiners), surrogates, private and unassigned
# characters, and the two separators that break lines.
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
_MARKDOWN = re.compile(r"([\\`*_\[\]|~$])")


def printable(text: str) -> str:
    r"""Return a text in one line, every character that is not seen written as an escape.

    Args:
        text: anything, an answer of a model for instance.

    Returns:
        The text with line ends as \n, escape characters as \x1b and so on. It may still hold
        markup: see as_markdown, escape it for HTML, and give it to rich as a Text, not as a
        string.

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
    r"""Return a text for inside a line or table cell of Markdown: no markup, no HTML, no links.

    At the start of a line a "#" or "-" would still make a heading or a list.

    Examples:
        >>> print(as_markdown("<i>|`*x*` http://a.b"))
        &lt;i&gt;\|\`\*x\*\` http&#58;//a.b
    """
    plain = _MARKDOWN.sub(r"\\\1", printable(text))
    plain = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # GitHub makes links of bare addresses and of names after an at sign
    plain = plain.replace("://", "&#58;//").replace("@", "&#64;")
    return re.sub(r"(?i)(www)\.", r"\1&#46;", plain)
