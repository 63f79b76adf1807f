"""Text files of people's own, read strictly: UTF-8, with a byte order mark in front or without.

`open(encoding="utf-8-sig")` reads the same, but its error names neither the file nor the line, and
a library that guesses encodings would guess wrong in silence.
"""

from __future__ import annotations

import codecs
from pathlib import Path

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text_file(what: str, path: Path | str) -> str:
    """Read a whole text file; a byte order mark, which editors on Windows write, is left out.

    Args:
        what: it is, for messages: "`templates`" where it is an argument's.
        path: the file.

    Returns:
        The text, its line ends as they are.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8; the message names file and line.
    """
    content = Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if content.startswith(_UTF_16):
            raise ValueError(f"{what} must be a UTF-8 file; {path} is UTF-16") from error
        line = len(content[: error.start + 1].splitlines())
        raise ValueError(
            f"{what} must be a UTF-8 file; {path}, line {line}, has the byte "
            f"0x{content[error.start]:02x}, which is none of a UTF-8 character"
        ) from error


def is_text(value: object) -> bool:
    r"""Tell whether this is a string that can be written: JSON's "\ud83d" is half a character."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
