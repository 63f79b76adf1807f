"""Compile kernels, whole and with a piece of their source left out, and print what came out.

    python tests/rows/compile_kernel.py '[[["linear", "bfloat16", ..., "sm_90"], ""], ...]'

A program of its own, because a process whose kernels are interpreted cannot compile them. The work
is done by bench/compiled/compiling.py and bench/compiled/compile_report.py.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from spoilt_source import (
    NARROW_ROW_INDEX,
    NO_FIRST_BARRIER,
    NO_SECOND_BARRIER,
    Change,
    load_changed,
)

from bench.compiled.compile_report import launches_of_a_run
from bench.compiled.compiling import TARGETS, Variant, compile_and_examine, launch_of, specialize
from str_kernels.op.rows import row_kernel

PIECES = {
    "first barrier": NO_FIRST_BARRIER,
    "second barrier": NO_SECOND_BARRIER,
    "int64": NARROW_ROW_INDEX,
    "rows": Change('["N"]', "[]", "row_step_kernel"),
    "alignment": Change(
        '["Target", "SafetyLogits", "Ref", "Norm", "Terms", "CeScale", "PenaltyScale", "Stash"]',
        '["Stash"]',
    ),
}


def kernels_without(piece: str, folder: Path) -> ModuleType:
    """Load the kernels' source without a piece of it."""
    (folder / piece).mkdir()
    return load_changed(row_kernel.__name__, folder / piece, PIECES[piece])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        kernels = {piece: kernels_without(piece, Path(folder)) for piece in PIECES}
        codes = []
        for fields, without in json.loads(sys.argv[1]):
            variant = Variant(*fields)
            launch = launch_of(variant, kernels.get(without, row_kernel))
            code = compile_and_examine(specialize(launch, TARGETS[variant.target]))
            codes.append({**code, "aligned": variant.aligned})
        target = variant.target
        runs = {None: launches_of_a_run(target)}
        runs |= {what: launches_of_a_run(target, kernels[what]) for what in ("rows", "alignment")}
        print(json.dumps({"codes": codes, "runs": [[what, rows] for what, rows in runs.items()]}))


if __name__ == "__main__":
    main()
