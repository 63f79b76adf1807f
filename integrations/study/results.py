"""The rows of a study's file, and what they say: means over seeds, differences, intervals."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from ...atomic import write_text
from ...locks import locked

FILE = "study.csv"
BASE = "taught base"
_DRAWS = 10_000  # of the bootstrap
_COLUMNS = (
    "plan task arm seed kind weight anchor_weight tokens per_step held steps learning_rate "
    "lora_rank refusals ceiling harmful harmless right asked task_loss seconds_per_step "
    "grad_norm_median grad_norm_largest train_loss_last"
).split()


@dataclass(frozen=True)
class Row:
    """One run and what came of it; outcomes are a letter a probe: r is a refusal."""

    task: str
    arm: str
    seed: int
    harmful: str
    harmless: str
    right: int
    asked: int
    task_loss: float
    columns: dict[str, str]

    @property
    def run(self) -> tuple[str, str, int]:
        """Return what tells it from the others."""
        return self.task, self.arm, self.seed

    def refused(self, kind: str) -> float:
        """Return the refused part of the "harmful" or "harmless" probes, in percent."""
        outcomes: str = getattr(self, kind)
        return 100 * outcomes.count("r") / len(outcomes)


def read_rows(path: Path, plan: str) -> list[Row]:
    """Read the rows of a plan; [] where there is no file.

    Raises:
        ValueError: it is not a study's file; names the line.
    """
    if not path.exists():
        return []
    rows = []
    reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))
    for row in reader:
        try:
            if row["plan"] == plan:
                rows.append(_row(row))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"`output` must hold a study's file; got {path}, line {reader.line_num}: {error}"
            ) from error
    return rows


def _row(row: dict[str, str]) -> Row:
    return Row(
        row["task"],
        row["arm"],
        int(row["seed"]),
        row["harmful"],
        row["harmless"],
        int(row["right"]),
        int(row["asked"]),
        float(row["task_loss"]),
        row,
    )


def add_row(path: Path, plan: str, run: Any, values: dict[str, Any]) -> None:
    """Add a run's row; several processes may, and the file is whole at any moment."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    row = {**values, "plan": plan, "task": run.task, "arm": run.arm, "seed": run.seed}
    with locked(path.with_name(f".{path.name}.lock"), wait=True):
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        if not before:
            writer.writeheader()
        writer.writerow(row)
        write_text(path, before + text.getvalue())


@dataclass(frozen=True)
class Summary:
    """An arm on a task over its seeds.

    Attributes:
        seeds: which.
        harmful: refused, percent, and kept: the same as a part of the base's.
        harmless: refused, percent, and over: minus the base's, in points.
        right: right answers, percent, and cost: plain's minus it, in points.
        task_loss: held out, nats per token.
    """

    seeds: tuple[int, ...]
    harmful: float
    kept: float | None
    harmless: float
    over: float | None
    right: float
    cost: float | None
    task_loss: float


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its bootstrap interval of 95 %."""

    value: float
    low: float
    high: float
    pairs: int


class Found:
    """All rows of a study."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self._by_run = {row.run: row for row in rows}

    def of(self, task: str, arm: str) -> list[Row]:
        """Return the rows of an arm on a task, by seed."""
        found = [row for row in self.rows if (row.task, row.arm) == (task, arm)]
        return sorted(found, key=lambda row: row.seed)

    def base(self, row: Row) -> Row | None:
        """Return the taught model that a row's run began with."""
        return self._by_run.get(("sums", BASE, row.seed))

    def tasks(self) -> list[str]:
        """Return the tasks in the order of their first rows."""
        return list(dict.fromkeys(row.task for row in self.rows if row.arm != BASE))

    def arms(self, task: str) -> list[str]:
        """Return the arms of a task, likewise."""
        return list(dict.fromkeys(row.arm for row in self.rows if row.task == task))

    def summary(self, task: str, arm: str) -> Summary:
        """Return the means of an arm over its seeds, beside the same seeds of base and plain."""
        rows = self.of(task, arm)
        kept, over, cost = [], [], []
        for row in rows:
            base, plain = self.base(row), self._by_run.get((task, "plain", row.seed))
            if base is not None:
                kept.append(row.refused("harmful") / max(base.refused("harmful"), 1e-9))
                over.append(row.refused("harmless") - base.refused("harmless"))
            if plain is not None:
                cost.append(100 * (plain.right / plain.asked - row.right / row.asked))
        return Summary(
            tuple(row.seed for row in rows),
            mean(row.refused("harmful") for row in rows),
            mean(kept) if kept else None,
            mean(row.refused("harmless") for row in rows),
            mean(over) if over else None,
            mean(100 * row.right / row.asked for row in rows),
            mean(cost) if cost else None,
            mean(row.task_loss for row in rows),
        )

    def difference(
        self, task: str, first: str, second: str, measure: Callable[[Row], float]
    ) -> Interval | None:
        """Return the first arm's mean minus the second's, over the seeds that both have.

        The interval is of the mean over seeds: the pairs are drawn anew with replacement. None
        with fewer than two pairs.
        """
        pairs = [
            measure(row) - measure(other)
            for row in self.of(task, first)
            if (other := self._by_run.get((task, second, row.seed))) is not None
        ]
        if len(pairs) < 2:
            return None
        draw = random.Random(0)
        means = sorted(mean(draw.choices(pairs, k=len(pairs))) for _ in range(_DRAWS))
        low, high = means[_DRAWS // 40], means[-_DRAWS // 40 - 1]
        return Interval(mean(pairs), low, high, len(pairs))
