"""Read rows of training data from files, saved data sets or the hub, each with its place.

JSON Lines and CSV are read line by line here, not by `datasets`, which does not name a broken line
and changes the content: 5.2 turns the text "2024-01-02" into a date and NA in a CSV file into
nothing, and older releases give every tool call the arguments of all others, as nulls.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TRAIN = "train"

Placed = tuple[str, Any]
"""The place of a row ("rows.jsonl, line 3"), and the row."""


def read_rows(source: Path | str, split: str | None = None, name: str = "data") -> Iterator[Placed]:
    """Read rows of any form, without checking them.

    Args:
        source: a .jsonl, .json, .csv or .parquet file, a folder made by `Dataset.save_to_disk`, or
            the id of a data set on the hub, which `datasets` then downloads.
        split: of a data set that has several; None means "train".
        name: of the argument, for messages.

    Yields:
        The place of a row, and the row.

    Raises:
        ValueError: the source cannot be read; the message names the line if it is known.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    on_hub = not (path.exists() or suffix) and _HUB_ID.fullmatch(str(source))
    if path.is_dir() or suffix in (".parquet", ".arrow") or on_hub:
        yield from _table(path, str(source), split, name)
        return
    if split is not None:
        raise ValueError(f"`data_split` must be left out for a file without splits; got {split!r}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"`{name}` must be a readable file, a saved data set or the id of one on the hub; "
            f"got {source}: {error.strerror or error}"
        ) from error
    content = content.removeprefix(b"\xef\xbb\xbf")  # the byte order mark of Windows editors
    if suffix == ".csv":
        yield from _csv(path, content)
    elif content.lstrip()[:1] == b"[" and suffix == ".json":
        for number, row in enumerate(_json(content, path.name), start=1):
            yield f"{path.name}, row {number}", row
    else:
        for number, line in enumerate(content.splitlines(), start=1):
            if line.strip():
                where = f"{path.name}, line {number}"
                yield where, _json(line, where)


def without_nulls(value: Any) -> Any:
    """Remove null values, which tables add so that all rows have the same keys."""
    if isinstance(value, dict):
        return {key: without_nulls(kept) for key, kept in value.items() if kept is not None}
    if isinstance(value, list):
        return [without_nulls(kept) for kept in value]
    return value


def _json(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except ValueError as error:  # includes UnicodeDecodeError and JSONDecodeError
        raise ValueError(f"`data` must hold training rows; {where}: {error}") from error


def _csv(path: Path, content: bytes) -> Iterator[Placed]:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`data` must hold training rows; {path.name}: {error}") from error
    # The size of a field is not limited. The csv limit holds for the whole process, so it is only
    # ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            # csv uses None as the key of extra fields and as the value of missing ones
            found = {key: value for key, value in row.items() if key and value is not None}
            yield f"{path.name}, line {reader.line_num}", found
    except csv.Error as error:
        raise ValueError(
            f"`data` must hold training rows; {path.name}, line {reader.line_num + 1}: {error}"
        ) from error


def _table(path: Path, source: str, split: str | None, name: str) -> Iterator[Placed]:
    import datasets

    try:
        if path.is_dir():
            table = datasets.load_from_disk(source)
        elif path.suffix:
            kind = path.suffix.lower().removeprefix(".")
            table = datasets.load_dataset(kind, data_files=source, split=_TRAIN)
        else:
            table = datasets.load_dataset(source)
    except Exception as error:  # any error of its readers or the network
        raise ValueError(
            f"`{name}` must be a readable file, a saved data set or the id of one on the hub; "
            f"got {source}: {_first_line(error)}"
        ) from error
    if isinstance(table, dict):
        wanted = split or _TRAIN
        if wanted not in table:
            raise ValueError(f"`data_split` must be one of {', '.join(table)}; got {wanted!r}")
        table = table[wanted]
    for number, row in enumerate(table, start=1):
        yield f"{path.name}, row {number}", without_nulls(row)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
