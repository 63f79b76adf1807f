"""Show rows as a table in the terminal, as JSON or as Markdown."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress
from rich.table import Table


class Column(NamedTuple):
    """A column: its heading, the key of its value, and how a value is written.

    With `upto` the value of a second key follows, after a dash.
    """

    heading: str
    key: str
    write: Callable[[Any], str] = str
    upto: str = ""


def times(value: Any) -> str:
    """Write a ratio."""
    return f"{float(value):.2f}"


def megabytes(value: Any) -> str:
    """Write bytes as MB."""
    return f"{float(value) / 1e6:,.0f}"


def number(value: Any) -> str:
    """Write a number: whole from 100 on."""
    return f"{float(value):,.0f}" if float(value) >= 100 else f"{float(value):.3g}"


def seconds(value: Any) -> str:
    """Write ms as seconds."""
    return f"{float(value) / 1000:.1f}"


def small(value: Any) -> str:
    """Write an error."""
    return f"{float(value):.1e}"


SPEED = (  # narrow, for a terminal of 80 columns
    Column("provider", "provider"),
    Column("ms", "median_ms", number),
    Column("quartiles", "low_ms", number, upto="high_ms"),
    Column("/ by\nhand", "against_eager", times),
    Column("/ bare", "against_products", times),
    Column("peak\nMB", "peak_bytes", megabytes),
    Column("error", "gradient_error", small),
)


def cells(row: Mapping[str, Any], columns: Sequence[Column]) -> list[str]:
    """Return the texts of a row; a value of None or "" is left blank."""
    texts = []
    for column in columns:
        keys = [column.key, column.upto] if column.upto else [column.key]
        values = [row.get(key) for key in keys]
        blank = any(value in (None, "") for value in values)
        texts.append("" if blank else "-".join(column.write(value) for value in values))
    return texts


def show(title: str, rows: Iterable[Mapping[str, Any]], columns: Sequence[Column]) -> None:
    """Print a table; the first column is text, the others are numbers."""
    table = Table(title=title, pad_edge=False)
    for index, column in enumerate(columns):
        if index:
            table.add_column(column.heading, justify="right", no_wrap=True)
        else:
            table.add_column(column.heading, overflow="fold")
    for row in rows:
        table.add_row(*cells(row, columns))
    Console().print(table)


def show_speed(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the times, then why other providers were not timed, and how it was measured."""
    show(title, [row for row in rows if row["status"] == "timed"], SPEED)
    say_why(rows)
    for row in rows:
        if row["status"] == "timed" and row["why"]:
            say(f"{row['provider']} says: {row['why']}")
    say(f"{rows[0]['protocol']} torch {rows[0]['torch']}, triton {rows[0]['triton']}.")


def say_why(rows: Iterable[Mapping[str, Any]]) -> None:
    """Print which providers were not timed and why, grouped by reason."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != "timed":
            reasons.setdefault(f"{row['status']}, {row['why']}", []).append(row["provider"])
    for reason, names in reasons.items():
        say(f"{', '.join(names)}: {reason}")


def say(text: str) -> None:
    """Print text, wrapped; brackets in it are not markup."""
    Console().print(text, markup=False, highlight=False)


def print_json(rows: object) -> None:
    """Print JSON and nothing else."""
    json.dump(rows, sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")


@contextlib.contextmanager
def progress(what: str) -> Iterator[tuple[Callable[[int], None], Callable[[], None]]]:
    """Show a progress bar on stderr; yield functions that set its length and advance it."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda total: bar.update(task, total=total), lambda: bar.advance(task)


def markdown(rows: Iterable[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    """Return a Markdown table."""
    heads = [column.heading.replace("\n", " ") for column in columns]
    lines = [heads, ["---", *["---:"] * (len(columns) - 1)], *(cells(r, columns) for r in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
