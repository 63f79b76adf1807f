"""Compile the kernels for each GPU and check the results: no spill, wide loads.

It also counts what a training run compiles: one kernel per path, whatever changes between steps.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import torch
import triton

from str_kernels import SafetyPenalty, safety_cross_entropy, safety_linear_cross_entropy
from str_kernels.op import autograd, chunks
from str_kernels.op.contracts import PenaltyKind
from str_kernels.op.rows import row_kernel, rows_triton

from .. import tables
from ..results import Row
from ..tables import Column
from .compiling import TARGETS, Variant, compile_and_examine, launch_of, recording, specialize

PROTOCOL = (
    "triton.compile without a device, of what the launcher launches; registers and spills by "
    "cuobjdump -res-usage (NVIDIA) and the code object's metadata (AMD)."
)
VOCABS = (32000, 32001, 32768, 49152, 50257, 128256, 151936, 256000, 262144)
PATHS = ("linear", "evaluation", "forward", "backward", "scatter")
DTYPES = ("bfloat16", "float16", "float32")
KINDS = get_args(PenaltyKind)


def every_variant() -> Iterator[Variant]:
    """Yield every shipped configuration; many of them compile to the same code."""
    kinds = [(0, "mse"), *((64, kind) for kind in KINDS), (1024, "subset_kl"), (1024, "logprob")]
    kinds.append((1024, "coarse_kl"))
    for target, path, dtype, vocab, (ids, kind), everything in itertools.product(
        TARGETS, PATHS, DTYPES, VOCABS, kinds, (False, True)
    ):
        variant = Variant(path, dtype, vocab, ids, kind, everything, target)
        if _exists(variant):
            yield variant
            if target == "gfx942" and path in ("forward", "backward"):
                yield variant._replace(large=True)


def sample() -> Iterator[Variant]:
    """Yield a sample with every path, dtype, target, kind and block, but not every combination."""
    for target, path in itertools.product(TARGETS, PATHS):
        variants = [
            Variant(path, "bfloat16", vocab, 64, "mse", everything, target)
            for vocab in (32768, 128256, 50257)
            for everything in (False, True)
        ]
        variants.append(Variant(path, "float16", 256000, 0, "mse", False, target))
        variants.append(Variant(path, "float32", 128256, 1024, "subset_kl", True, target))
        if path == "linear":
            variants += [
                Variant(path, "bfloat16", 32000, 64, kind, False, target) for kind in KINDS[1:]
            ]
        if target == "gfx942" and path in ("forward", "backward"):
            variants.append(variants[2]._replace(large=True))
        yield from filter(_exists, variants)


def _exists(variant: Variant) -> bool:
    if variant.path == "scatter":
        plain = variant.kind == "mse" and not variant.everything
        return plain and variant.ids > 0 and variant.target == "gfx942"
    return True


def report(
    variants: Iterable[Variant],
    *,
    lines: Path | None = None,
    started: Callable[[int], None] = lambda total: None,
    advanced: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Compile each distinct kernel once, and report its properties and whether it may be shipped.

    Args:
        variants: what to compile.
        lines: a file of JSON lines to which each result is added; results of an earlier,
            interrupted report are read from it.
        started: called once, with the number of distinct kernels.
        advanced: called after each.

    Returns:
        A row for each distinct kernel.
    """
    known = {row["key"]: row for row in _read(lines)}
    codes: dict[str, tuple[Variant, Any]] = {}
    rows = []
    for variant in variants:
        code = specialize(launch_of(variant), TARGETS[variant.target])
        codes.setdefault(code.key, (variant, code))
    started(len(codes))
    for key, (variant, code) in codes.items():
        row = known.get(key)
        if row is None:
            row = {"key": key, **variant._asdict(), "status": "compiled"}
            row |= compile_and_examine(code)
            if lines is not None:
                lines.parent.mkdir(parents=True, exist_ok=True)
                with lines.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        rows.append(row | _judgement(row, aligned=variant.aligned))
        advanced()
    return rows


def _judgement(row: Row, aligned: bool) -> Row:
    narrow = any(row[f"wide_{what}"] < row.get(f"row_{what}", 0) for what in ("loads", "stores"))
    spilt = any(row["spills"].values())
    return {"spilt": spilt, "narrow": aligned and narrow, "bad": spilt or (aligned and narrow)}


def _read(lines: Path | None) -> list[Row]:
    if lines is None or not lines.exists():
        return []
    rows = []
    for line in lines.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the run was cut off while it wrote
            continue
    return rows


def summary(rows: Sequence[Row]) -> list[Row]:
    """Return a row per target, path and dtype: how many kernels, and the worst of each value."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["status"] == "compiled":
            names = ("target", "path", "on_chip", "dtype")
            groups.setdefault(tuple(row.get(name) for name in names), []).append(row)
    found = []
    for (target, path, held, dtype), members in groups.items():
        short = dtype.replace("bfloat", "bf").replace("float", "fp")
        found.append(
            {
                "what": f"{target} {path} {'held ' if held else ''}{short}",
                "codes": len(members),
                "registers": max(row["registers"] for row in members),
                "shared": max(row["shared"] for row in members),
                "spilt": sum(row["spilt"] for row in members),
                "narrow": sum(row["narrow"] for row in members),
                "seconds": sum(row["seconds"] for row in members),
            }
        )
    return found


# A run: rows per step with ragged last chunks, and what else changes from step to step.
_RUN_ROWS = (64, 61, 48, 37, 16, 90, 33)
_RUN_VOCAB, _RUN_IDS, _RUN_WIDTH = 1000, 5, 8
EXPECTED_KEYS = {"linear": 1, "linear, packed": 1, "linear, no gradient": 1, "logits": 2}


def launches_of_a_run(target: str = "sm_90", kernels: Any = row_kernel) -> list[Row]:
    """Count the launches of a training run and the kernels that they compile, for each path.

    The ops run unchanged, with chunks of an odd number of rows; their launches are recorded and
    not run. The number of rows, the weight of the penalty, the counts and the upstream gradient
    change from step to step.

    Returns:
        A row for each path: the launches, how many distinct kernels they compile, and how many
        are expected, which is one for each distinct launch of a step.
    """
    rows = []
    for path, expected in EXPECTED_KEYS.items():
        step = mock.Mock(return_value=rows_triton.row_step_triton)
        with (
            recording(TARGETS[target], kernels) as launches,
            mock.patch.object(chunks, "row_step_of", step),
            mock.patch.object(autograd, "row_step_of", step),
        ):
            for number, n in enumerate(_RUN_ROWS):
                _train_step(path, number, n)
        keys = {specialize(launch, TARGETS[target]).key for launch in launches}
        # and one for a second launch, if there is one
        expected += len({launch.kernel for launch in launches}) - 1
        rows.append(
            {
                "path": f"a run, {path}",
                "target": target,
                "status": "counted",
                "launches": len(launches),
                "codes": len(keys),
                "expected_codes": expected,
                "bad": len(keys) != expected,
            }
        )
    return rows


def _train_step(path: str, number: int, rows: int) -> None:
    weight = 0.1 / (1 + number)
    mask = torch.arange(rows) % 3 > 0
    options: dict[str, Any] = {
        "penalty": SafetyPenalty(weight if number % 2 else torch.tensor(weight)),
        "safety_row_weight": mask.float(),
        "num_items": float(rows + number) if number % 2 else torch.tensor(rows + number),
        "backend": "torch",  # replaced by the recorded launcher
    }
    target = torch.where(mask, torch.arange(rows) % _RUN_VOCAB, -100)
    target[number % rows :: 5] = -100
    given = (target, torch.arange(_RUN_IDS) * 7, torch.zeros(rows, _RUN_IDS))
    if path == "logits":
        logits = torch.zeros(rows, _RUN_VOCAB, dtype=torch.bfloat16, requires_grad=True)
        loss = safety_cross_entropy(logits, *given, **options).loss
    else:
        hidden = torch.zeros(rows, _RUN_WIDTH, dtype=torch.bfloat16, requires_grad=True)
        head = torch.zeros(_RUN_VOCAB, _RUN_WIDTH, dtype=torch.bfloat16)
        chunk_bytes = 7 * 2 * 1008  # of rows of 1,008 elements
        options.update(pack_rows=path.endswith("packed"), chunk_bytes=chunk_bytes)
        with torch.set_grad_enabled(not path.endswith("no gradient")):
            loss = safety_linear_cross_entropy(hidden, head, *given, **options).loss
    if loss.requires_grad:
        (loss * (1.0 + number)).backward()


def show(rows: Sequence[Row], runs: Sequence[Row]) -> None:
    """Print a table of what was compiled, then the failures and the runs."""
    shown = summary(rows)
    tables.show(
        "compiled kernels",
        shown,
        [
            Column("GPU, path, dtype", "what"),
            Column("codes", "codes"),
            Column("regs", "registers"),
            Column("shared", "shared"),
            Column("spilt", "spilt"),
            Column("narrow", "narrow"),
            Column("s", "seconds", "{:.0f}".format),
        ],
    )
    for row in rows:
        if row.get("spilt") or row.get("narrow"):
            name = " ".join(str(row[field]) for field in Variant._fields)
            tables.say(f"bad: {name}: {row['spills']}, narrow: {row['narrow']}")
    for row in runs:
        tables.say(
            f"{row['path']}, {row['target']}: {row['launches']} launches, {row['codes']} compiled, "
            f"{row['expected_codes']} expected"
        )
    tables.say(f"{PROTOCOL} torch {torch.__version__}, triton {triton.__version__}.")
