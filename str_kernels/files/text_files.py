"""Read users' text files strictly: UTF-8, with or without a byte order mark.

`open(encoding="utf-8-sig")` reads the same, but its error names neither the file nor the line. A
library that guesses encodings may silently guess wrong.
"""

from __future__ import annotations

import codecs
from pathlib import Path

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text_file(what: str, path: Path | str) -> str:
    """Read a whole text file, without the byte order mark that editors on Windows write.

    Args:
        what: what the file is, for messages, such as "`templates`" for an argument.
        path: the file.

    Returns:
        The text, its line ends unchanged.

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
    r"""Return whether `value` is a string that UTF-8 can encode: "\ud83d" in JSON is not."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
