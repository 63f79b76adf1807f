"""A training step of long rows, by every way to make the loss: peak memory and time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from str_kernels.atomic import replacing
from str_kernels.loss_memory import available_bytes

from ..results import Row, origin
from ..steps.timing import quartiles, ratio_quartiles
from .longcontext_child import ANCHORS, BY_HAND, CACHED, LIVE, OWN, TRL, WAYS

TOKENS = (2048, 8192)
_ROOT = Path(__file__).parents[2]
_LEFT_FREE = 1 << 30  # bytes: for everything else on the machine
# Of torch and glibc: `finetune` sets the first; the second is what a process has that sets nothing.
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
        tokens: of the row.
        ways: of WAYS.
        rounds: of all ways in turn, at each length.
        memory: GB that a process may take, no more than there are.
        rank: of the adapters.
        allocator: "pages" or "default".
        advanced: called with each row when it is complete.
        ran: called after each process.

    Returns:
        A row for each: status ("measured", "out of memory" or "failed: why"), peak bytes, seconds
        and quartiles, and both against the model's own loss and naive STR of the same run.
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
            if CACHED in ways:  # by another process: what that frees would be there in the step
                built = _in_child({**same, "who": CACHED, "builds_cache": True}, {})
                if built["status"] != "built":
                    found[CACHED].append(built)
            for _ in range(rounds):
                for who in ways:
                    if any(one["status"] != "measured" for one in found[who]):
                        continue  # it would again
                    found[who].append(_in_child({**same, "who": who}, ALLOCATORS[allocator]))
                    ran()
            for row in _rows(found):
                made.append(base | {"tokens": count, "allocator": allocator, **row})
                advanced(made[-1])
    return made


def _rows(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Row]:
    """Yield what was found at one length, each against the model's own loss and naive STR."""
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
    command = [sys.executable, "-m", "bench.memory.longcontext_child", json.dumps(job)]
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=_ROOT,
        env=environment | dict(allocator),
    )  # fmt: skip
    if done.returncode < 0:
        return {"status": f"killed by {signal.Signals(-done.returncode).name}"}
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"status": f"failed: {last[:200]}"}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def draw(
    rows: Sequence[Mapping[str, Any]], path: Path, computed: Mapping[int, int] | None = None
) -> None:
    """Draw peak memory and time over the tokens, a line for each way; a PNG.

    Args:
        rows: of `measure`, or of its file; of two of one way and length the later.
        path: of the PNG.
        computed: tokens to the bytes that layers' inputs and one layer's backward need.
    """
    latest = {(row["who"], int(row["tokens"])): row for row in rows}  # of several runs
    rows = list(latest.values())
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    for axes, key, unit, label in zip(
        figure.subplots(1, 2), ("peak_bytes", "seconds"), (1e9, 1.0),
        ("peak above the loaded model, GB", "seconds of a step"), strict=True,
    ):  # fmt: skip
        for place, who in enumerate(WAYS):
            mine = sorted(
                (int(row["tokens"]), float(row[key]) / unit)
                for row in rows
                if row["who"] == who and row["status"] == "measured"
            )
            if not mine:
                continue
            ours = who.startswith("ours")
            axes.plot(
                *zip(*mine, strict=True),
                marker="osv^Dx"[place],
                color=_COLOURS[who],
                linewidth=2 if ours else 1.2,
                linestyle="-" if ours else "--",
                label=who,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)  # whose ticks are few and whole
        axes.set_xticks(sorted({int(row["tokens"]) for row in rows}))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set_xlabel("tokens of the row")
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3, which="both")
    if computed:
        figure.axes[0].plot(
            list(computed), [size / 1e9 for size in computed.values()],
            color="black", linewidth=0.8, linestyle=":", label="ours, tensors alone (computed)",
        )  # fmt: skip
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


_COLOURS = {
    OWN: "#555555",
    BY_HAND: "#b03a2e",
    TRL: "#9a7d0a",
    LIVE: "#5b9bd5",
    CACHED: "#76b7b2",
    ANCHORS: "#1b6ca8",
}
