"""`make gpu`: the timing table of this GPU, with nothing but torch and triton installed.

The sizes that the targets are stated for come first; the others are measured while time remains.
"""

from __future__ import annotations

import argparse
import itertools
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from str_kernels import SafetyPenalty, safety_cross_entropy
from str_kernels.loss_memory import measure_peak
from str_kernels.op.chunks import row_bytes, rows_per_chunk

from .inputs import WEIGHT
from .results import FOLDER, Row, append_rows, device_name, origin
from .steps.heads import HeadShape
from .steps.speed import Job, measure
from .steps.timing import one_line, quartiles, rounds

_IDS, _ROUNDS, _DEADLINE = 64, 15, 300.0
_COMPILED = "torch.compile"
_OTHERS = ("eager", "F.linear_cross_entropy", "Liger", "CCE")
_LOGITS = "ours, logits path"

# The targets; a row that has one says whether it is met.
MAX_OF_PRODUCTS = 1.15  # linear path, frozen head: time over that of the two products
MIN_OF_COPY = 0.85  # logits path: its bytes per second over those of a copy
MAX_OF_CHUNK = 1.2  # linear path, frozen head: peak above inputs and gradient, over the chunk

_LOGITS_PROTOCOL = (
    "{count} rounds of the loss from logits, forward and backward, and of a copy of the logits, in "
    "turn. The loss asks for 6 V bytes a row (python -m bench traffic), the copy for 4 V."
)


class Size(NamedTuple):
    """A head and a number of tokens."""

    tokens: int  # N
    width: int  # D
    vocab: int  # V

    @property
    def work(self) -> int:
        """Return what a product costs, up to a factor."""
        return self.tokens * self.width * self.vocab


TARGET_SIZES = (Size(8192, 4096, 128256), Size(8192, 4096, 151936))
_EVERY = itertools.product((4096, 8192, 16384), (2048, 4096), (32000, 128256, 151936, 262144))
SIZES = (
    *TARGET_SIZES,
    *sorted({Size(*size) for size in _EVERY} - {*TARGET_SIZES}, key=lambda size: size.work),
)


def run(
    sizes: Sequence[Size] = SIZES,
    deadline: float = _DEADLINE,
    *,
    measure_size: Callable[[Size, bool], list[Row]],
    keep: Callable[[list[Row]], None] = lambda rows: None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[list[Row], list[str]]:
    """Measure one size after another, as long as the next can be expected to finish in time.

    Args:
        sizes: the first `len(TARGET_SIZES)` of them are measured with torch.compile too, whose
            compilations take longer than everything else.
        deadline: seconds from now.
        measure_size: measures one size, with torch.compile or without.
        keep: called with each size's rows at once, so that a kill loses only one size.
        clock: returns seconds.

    Returns:
        The rows, and a line for each size that was left out.
    """
    start = clock()
    rows: list[Row] = []
    left_out: list[str] = []
    seconds_per_work = 0.0
    for index, size in enumerate(sizes):
        with_compile = index < len(TARGET_SIZES)
        began = clock()
        name = f"N {size.tokens}, D {size.width}, V {size.vocab}"
        left = deadline - (began - start)
        if left <= 0 or seconds_per_work * size.work > left:
            left_out.append(f"{name}: no time, {max(left, 0):.0f} s were left")
            continue
        try:
            found = measure_size(size, with_compile)
        except Exception as error:  # out of memory on a small card: the other sizes still count
            left_out.append(f"{name}: {one_line(error)}")
            continue
        rows += found
        keep(found)
        if not with_compile:
            # of the last one only: what a size takes beside its work is a smaller part of the next
            seconds_per_work = (clock() - began) / size.work
    return rows, left_out


def measure_size(
    size: Size, with_compile: bool, *, device: str = "cuda", count: int = _ROUNDS
) -> list[Row]:
    """Measure one size: the linear path with a frozen and a trained head, and the logits path."""
    ours = "ours (triton)" if device == "cuda" else "ours (torch)"
    only = [*_OTHERS, ours, *([_COMPILED] if with_compile else [])]
    rows = []
    for train_head in (False, True):
        shape = HeadShape(size.vocab, size.width)
        job = Job(shape, size.tokens, _IDS, torch.bfloat16, train_head, device)
        for row in measure(job, count, only=only, memory=device == "cuda"):
            judged = row["provider"] == ours and not train_head
            rows.append(row | {"target": _linear_target(row, size, device) if judged else ""})
    return [*rows, _logits_path(size, device, count)]


def _linear_target(row: Row, size: Size, device: str) -> str:
    """Say which targets for the linear path with a frozen head are met."""
    if row["status"] != "timed":
        return f"not met: {row['status']}"
    said = [_judge("time", row["against_products"], "<=", MAX_OF_PRODUCTS)]
    if row["peak_bytes"] is not None:
        like = torch.empty(0, size.width, dtype=torch.bfloat16, device=device)
        chunk = min(rows_per_chunk(like, size.vocab, None), size.tokens)
        gradient = size.tokens * size.width * like.element_size()
        above = row["peak_bytes"] - gradient
        share = above / (chunk * row_bytes(like, size.vocab))
        said.append(_judge("peak/chunk", share, "<=", MAX_OF_CHUNK))
    return "; ".join(said)


def _logits_path(size: Size, device: str, count: int) -> Row:
    """Time the loss from logits against a copy of them, the fastest way to move as many bytes."""
    logits = torch.randn(size.tokens, size.vocab, device=device, dtype=torch.bfloat16)
    logits.requires_grad_()
    target = torch.randint(0, size.vocab, (size.tokens,), device=device)
    ids = torch.randperm(size.vocab, device=device)[:_IDS]
    ref = torch.randn(size.tokens, _IDS, device=device)
    penalty = SafetyPenalty(WEIGHT)
    copy = torch.empty_like(logits.detach())

    def loss() -> None:
        terms = safety_cross_entropy(logits, target, ids, ref, penalty=penalty)
        torch.autograd.grad(terms.loss, logits)

    steps = {_LOGITS: loss, "copy": lambda: copy.copy_(logits.detach())}
    times, failed = rounds(steps, count, device)
    row = origin(device, _LOGITS_PROTOCOL.format(count=count)) | {
        "provider": _LOGITS,
        "status": "timed",
        "why": "",
        "N": size.tokens,
        "V": size.vocab,
        "K": _IDS,
        "dtype": "bfloat16",
        "rounds": count,
    }
    if failed:
        why = "; ".join(failed.values())
        return row | {"status": "failed", "why": why, "target": "not met: failed"}
    low, middle, high = quartiles(times[_LOGITS])
    elements = size.tokens * size.vocab
    share = quartiles([1.5 * c / t for t, c in zip(times[_LOGITS], times["copy"], strict=True)])[1]
    return row | {
        "median_ms": 1e3 * middle,
        "low_ms": 1e3 * low,
        "high_ms": 1e3 * high,
        "gb_per_s": 6 * elements / middle / 1e9,
        "copy_gb_per_s": 4 * elements / quartiles(times["copy"])[1] / 1e9,
        "peak_bytes": measure_peak(loss, device) if device == "cuda" else None,
        "target": _judge("of copy", share, ">=", MIN_OF_COPY),
    }


def _judge(what: str, value: float, relation: str, limit: float) -> str:
    met = value <= limit if relation == "<=" else value >= limit
    return f"{'met' if met else 'NOT met'}: {what} {value:.2f} {relation} {limit}"


_LINE = "{:>6} {:>5} {:>7} {:8} {:26} {:>9} {:>7} {:>8} {}"


def table(rows: Sequence[Row], left_out: Sequence[str]) -> str:
    """Return the rows as text, 80 columns and the targets, then what is missing and why."""
    lines = [_LINE.format("N", "D", "V", "head", "provider", "ms", "/ bare", "peak MB", "target")]
    for row in rows:
        head = {True: "trained", False: "frozen", None: "none"}[row.get("train_head")]
        shape = (row["N"], row.get("D", ""), row["V"], head, row["provider"])
        if row["status"] != "timed":
            lines.append(_LINE.format(*shape, row["status"], "", "", row["why"]).rstrip())
            continue
        ratio, peak = row.get("against_products"), row["peak_bytes"]
        more = row["target"]
        if "gb_per_s" in row:
            more += f"; {row['gb_per_s']:,.0f} GB/s, copy {row['copy_gb_per_s']:,.0f} GB/s"
        texts = (
            f"{row['median_ms']:.2f}",
            "" if ratio is None else f"{ratio:.2f}",
            "" if peak is None else f"{peak / 1e6:,.0f}",
        )
        lines.append(_LINE.format(*shape, *texts, more).rstrip())
    lines += [f"left out: {line}" for line in left_out]
    lines += dict.fromkeys(row["protocol"] for row in rows)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the rows as CSV under the card's name, and print the table last."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=main.__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help="for the CSV file")
    parser.add_argument("--deadline", type=float, default=_DEADLINE, help="seconds for all sizes")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no GPU")
    card = device_name("cuda")
    path = csv_of(card, given.folder)
    print(f"{card}, torch {torch.__version__}, K {_IDS}, bfloat16; rows go to {path}", flush=True)
    rows, left_out = run(
        deadline=given.deadline,
        measure_size=measure_size,
        keep=lambda found: append_rows(path, found),
    )
    print(table(rows, left_out))


def csv_of(card: str, folder: Path) -> Path:
    """Return the file of a card's rows."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") + ".csv")


if __name__ == "__main__":
    main()
