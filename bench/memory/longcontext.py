"""A training step of long rows with every way to compute the loss: peak memory and time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.ticker import StrMethodFormatter

from str_kernels.files.child_process import ChildFailed, in_child
from str_kernels.integrations.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    SKY,
    VERMILION,
    draw_bars,
    legend,
    new_figure,
    save,
    style,
)
from str_kernels.loss_memory import available_bytes

from ..results import ROOT, Row, origin
from ..steps.timing import quartiles, ratio_quartiles
from .longcontext_child import ANCHORS, BY_HAND, CACHED, LIVE, OWN, TRL, WAYS

TOKENS = (2048, 8192)
_LEFT_FREE = 1 << 30  # bytes: for everything else on the machine
# Settings of torch and glibc: `finetune` uses the first; the second is the default of a process.
ALLOCATORS = {"pages": {"THP_MEM_ALLOC_ENABLE": "1"}, "default": {}}

PROTOCOL = (
    "SmolLM2-135M with LoRA r = {rank} on all linear layers but the head, bfloat16, gradient "
    "checkpointing, SDPA, one row of random tokens, each a label, on the CPU: forward, backward "
    "and AdamW, each in a fresh process after a step of 16 tokens. Peak: resident bytes above that "
    "process before the step. Every way in turn, {rounds} round(s); medians. A process may take "
    "{limit:.1f} GB."
)


def measure(
    tokens: Sequence[int] = TOKENS,
    ways: Sequence[str] = WAYS,
    *,
    rounds: int = 3,
    memory: float = 24.0,
    rank: int = 8,
    allocator: str = "pages",
    advanced: Callable[[Row], None] = lambda row: None,
    ran: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Measure each way at each length.

    Args:
        tokens: lengths of the row.
        ways: names in WAYS.
        rounds: how often all ways are measured in turn at each length.
        memory: GB that a process may take, at most what the machine has.
        rank: of the adapters.
        allocator: "pages" or "default".
        advanced: called with each row when it is complete.
        ran: called after each process.

    Returns:
        A row for each: status ("measured", "out of memory" or "failed: why"), peak bytes, seconds
        and quartiles, and the ratios of both to the model's own loss and naive STR in this run.
    """
    limit = int(memory * 1e9)
    if there := available_bytes():  # 0 where the system does not say
        if there <= _LEFT_FREE:
            raise RuntimeError(f"there must be {_LEFT_FREE:,} bytes free; got {there:,}")
        limit = min(limit, there - _LEFT_FREE)
    base = origin("cpu", PROTOCOL.format(rank=rank, rounds=rounds, limit=limit / 1e9))
    made = []
    with tempfile.TemporaryDirectory() as folder:
        for count in tokens:
            found: dict[str, list[dict[str, Any]]] = {who: [] for who in ways}
            same = {"tokens": count, "rank": rank, "limit": limit, "folder": folder}
            same |= {"threads": torch.get_num_threads()}
            if CACHED in ways:  # in another process: memory freed here could be reused in the step
                built = _in_child({**same, "who": CACHED, "builds_cache": True}, {})
                if built["status"] != "built":
                    found[CACHED].append(built)
            for _ in range(rounds):
                for who in ways:
                    if any(one["status"] != "measured" for one in found[who]):
                        continue  # it would run out of memory again
                    found[who].append(_in_child({**same, "who": who}, ALLOCATORS[allocator]))
                    ran()
            for row in _rows(found):
                made.append(base | {"tokens": count, "allocator": allocator, **row})
                advanced(made[-1])
    return made


def _rows(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Row]:
    """Yield the results at one length, compared with the model's own loss and naive STR."""
    good = {
        who: each for who, each in found.items() if all(x["status"] == "measured" for x in each)
    }
    for who, each in found.items():
        row: Row = {"who": who, "status": each[-1]["status"]}
        if who in good:
            seconds = [float(one["seconds"]) for one in each]
            peak = median(float(one["peak_bytes"]) for one in each)
            low, middle, high = quartiles(seconds)
            row |= {"peak_bytes": int(peak), "seconds": middle, "low": low, "high": high}
            for name, other in (("own", OWN), ("naive", BY_HAND)):
                if other not in good:
                    continue
                row[f"peak_against_{name}"] = peak / median(x["peak_bytes"] for x in good[other])
                ratios = ratio_quartiles(seconds, [x["seconds"] for x in good[other]])
                row[f"time_against_{name}"] = ratios[1] if ratios else None
        yield row


def _in_child(job: dict[str, Any], allocator: Mapping[str, str]) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"} | allocator
    module = "bench.memory.longcontext_child"
    try:
        found: dict[str, Any] = in_child(
            module, job, job["who"], folder=ROOT, environment=environment
        )
    except ChildFailed as error:
        killed = f"killed by {error.signal}"
        return {"status": killed if error.signal else f"failed: {error.why[:200]}"}
    return found


def draw_saved(rows: Sequence[Mapping[str, Any]], path: Path, allocator: str = "pages") -> None:
    """Draw the rows of one allocator, with the memory of the tensors alone for comparison."""
    from .memory_parts import backward_bytes, parts_of

    mine = [row for row in rows if row["allocator"] == allocator]
    lengths = sorted({int(row["tokens"]) for row in mine})
    draw(mine, path, {n: backward_bytes(parts_of([n])) for n in lengths})


def draw(
    rows: Sequence[Mapping[str, Any]], path: Path, computed: Mapping[int, int] | None = None
) -> None:
    """Draw peak memory and the time of a step over the tokens, a line for each way, as a PNG.

    Args:
        rows: of `measure`, or of its file; for one way and length the latest row counts.
        path: of the PNG.
        computed: for each length, the bytes that layers' inputs and one layer's backward need.
    """
    latest = {(row["who"], int(row["tokens"])): row for row in rows}  # of several runs
    found = {key: row for key, row in latest.items() if row["status"] == "measured"}
    lengths = sorted({tokens for _, tokens in latest})
    # with nothing to compare it with, the time of one way says little, least for a long row
    compared = [n for n in lengths if sum(tokens == n for _, tokens in found) > 1]
    one = rows[0]
    figure = new_figure(
        4.6,
        _title(found, lengths),
        f"SmolLM2-135M with LoRA on one row in bfloat16, {one['device']}, torch {one['torch']}. "
        "Medians of the rounds; whiskers are the quartiles, where a length had more than one "
        "round. Dotted: the tensors of ours alone, computed.",
    )
    panels = figure.subplot_mosaic(
        [["peak", n] for n in compared] or [["peak"]], width_ratios=(1.4, 1) if compared else None
    )
    _draw_peaks(panels["peak"], found, lengths, computed or {})
    for tokens in compared:
        _draw_seconds(
            panels[tokens], [found[who, tokens] for who in WAYS if (who, tokens) in found]
        )
        last = "seconds of a step" if tokens == compared[-1] else ""
        style(panels[tokens], title=f"time at {tokens:,} tokens", x=last, grid="x")
    save(figure, path)


def _title(found: Mapping[tuple[str, int], Mapping[str, Any]], lengths: Sequence[int]) -> str:
    """Say what ours takes at the longest length at which the model's own loss was measured too."""
    for tokens in reversed(lengths):
        if (OWN, tokens) in found and (ANCHORS, tokens) in found:
            ours, own = (float(found[who, tokens]["peak_bytes"]) / 1e9 for who in (ANCHORS, OWN))
            return (
                f"A step on {tokens:,} tokens, held at anchors, peaks at {ours:.1f} GB above the "
                f"loaded model; with the model's own loss at {own:.1f}"
            )
    return "Peak memory and time of a step over the length of its row"


def _draw_peaks(
    axes: Any,
    found: Mapping[tuple[str, int], Mapping[str, Any]],
    lengths: Sequence[int],
    computed: Mapping[int, int],
) -> None:
    for who in WAYS:
        mine = [n for n in lengths if (who, n) in found]
        if mine:
            ours = who.startswith("ours")
            axes.plot(
                mine,
                [float(found[who, n]["peak_bytes"]) / 1e9 for n in mine],
                marker="osv^Dx"[WAYS.index(who)],
                markersize=5,
                color=_COLOURS[who],
                linewidth=1.8 if ours else 1.2,
                linestyle="-" if ours else "--",
                label=who,
            )
    if computed:
        sizes = [size / 1e9 for size in computed.values()]
        axes.plot(list(computed), sizes, ":", color=BLACK, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)  # so that the ticks are few and whole numbers
    axes.set_xticks(lengths)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    style(axes, title="peak memory above the loaded model (GB)", x="tokens of the row")
    if axes.lines:
        axes.set_ylim(bottom=min(min(line.get_ydata()) for line in axes.lines) / 2.5)
        legend(axes, loc="lower right")  # where the lines leave room below them


def _draw_seconds(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    values, low, high = ([float(row[key]) for row in rows] for key in ("seconds", "low", "high"))
    names = [row["who"] for row in rows]
    draw_bars(axes, names, values, [_COLOURS[name] for name in names], (low, high))


_COLOURS = {
    OWN: BLACK,
    BY_HAND: VERMILION,
    TRL: GREY,
    LIVE: SKY,
    CACHED: GREEN,
    ANCHORS: BLUE,
}
