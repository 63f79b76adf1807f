"""The rows of a study's file, with means over seeds, differences and intervals."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from ...files import locked, write_text

FILE = "study.csv"
BASE = "taught base"
_DRAWS = 10_000  # bootstrap samples
_COLUMNS = (
    "plan task arm seed kind weight anchor_weight tokens per_step held steps learning_rate "
    "lora_rank refusals ceiling harmful harmless right asked task_loss seconds_per_step "
    "grad_norm_median grad_norm_largest train_loss_last"
).split()


@dataclass(frozen=True)
class Row:
    """One run and its results; outcomes have one letter per probe, r for a refusal."""

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
        """Return the run's key: task, arm and seed."""
        return self.task, self.arm, self.seed

    def refused(self, kind: str) -> float:
        """Return the percentage of "harmful" or "harmless" probes that were refused."""
        outcomes: str = getattr(self, kind)
        return 100 * outcomes.count("r") / len(outcomes)


def read_rows(path: Path, plan: str) -> list[Row]:
    """Read the rows of a plan; [] if there is no file.

    Raises:
        ValueError: the file is not a study's; the message names the line.
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
    """Add a run's row; several processes may do so, and the file is whole at any moment."""
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
    """Means of an arm on a task over its seeds.

    Attributes:
        seeds: the seeds.
        harmful: harmful probes refused, percent.
        kept: the same as a fraction of the base's.
        harmless: harmless probes refused, percent.
        over: the same minus the base's, in points.
        right: right answers, percent.
        cost: plain fine-tuning's right answers minus the arm's, in points.
        task_loss: on held-out rows, nats per token.
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
    """A mean over seeds and its 95 % bootstrap interval."""

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
        """Return the row of the taught model that a run began with."""
        return self._by_run.get(("sums", BASE, row.seed))

    def tasks(self) -> list[str]:
        """Return the tasks in the order of their first rows."""
        return list(dict.fromkeys(row.task for row in self.rows if row.arm != BASE))

    def arms(self, task: str) -> list[str]:
        """Return the arms of a task in the order of their first rows."""
        return list(dict.fromkeys(row.arm for row in self.rows if row.task == task))

    def summary(self, task: str, arm: str) -> Summary:
        """Return an arm's means over its seeds, compared with base and plain of the same seeds."""
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

        The interval is that of the mean over seeds, from a bootstrap over the pairs. None if there
        are fewer than two pairs.
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
