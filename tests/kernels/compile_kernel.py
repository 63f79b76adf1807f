"""Compile kernels, whole and with a piece of their source left out, and print what came out.

    python tests/kernels/compile_kernel.py '[[["linear", "bfloat16", ..., "sm_90"], ""], ...]'

A program of its own, because a process whose kernels are interpreted cannot compile them. The work
is done by bench/compiled/compiling.py and bench/compiled/compile_report.py.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.compiled.compile_report import launches_of_a_run
from bench.compiled.compiling import TARGETS, Variant, compile_and_examine, launch_of, specialize
from str_kernels.op.rows import row_kernel

# Each must be in the source exactly once.
PIECES = {
    "first barrier": "        tl.debug_barrier()  # every warp has read",
    "second barrier": "            tl.debug_barrier()  # other threads of this program wrote",
    "int64": "pid_n = tl.program_id(0).to(tl.int64)",
    "rows": '    do_not_specialize=["N"],\n',
    "alignment": '"Target", "SafetyLogits", "Ref", "Norm", "Terms", "CeScale", "PenaltyScale", ',
}
INSTEAD = {
    "first barrier": "        pass  #",
    "second barrier": "            pass  #",
    "int64": "pid_n = tl.program_id(0)",
}


def kernels_without(piece: str, folder: str) -> Any:
    """Load the kernels' source without a piece of it."""
    source, text = Path(row_kernel.__file__).read_text(encoding="utf-8"), PIECES[piece]
    if source.count(text) != 1:
        raise SystemExit(f"{text!r} is in {source.count(text)} places")
    path = Path(folder, f"row_kernel_without_{piece.replace(' ', '_')}.py")
    path.write_text(source.replace(text, INSTEAD.get(piece, "")), encoding="utf-8")
    name = f"str_kernels.op.rows.{path.stem}"  # its imports are relative
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        kernels = {piece: kernels_without(piece, folder) for piece in PIECES}
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
