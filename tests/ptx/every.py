"""Execute every shipped code, every test marked gpu and every mutant, portion by portion.

    python tests/ptx/every.py [--targets sm_90 ...] [--minutes 30] [--only codes]

Each portion is a process of pytest. Its result is a line of .benchmarks/ptx.jsonl, and one that has
passed with the same sources is not run again: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LINES = ROOT / ".benchmarks" / "ptx.jsonl"
TARGETS = ("sm_90", "sm_80", "sm_100")
CODES = 12  # portions of the shipped codes of a GPU
# Of the tests marked gpu: how warps take turns, and the errors of approximate instructions.
WAYS = {
    "sm_90": (("lockstep", ""), ("random", "7")),
    "sm_80": (("reversed", "-1"),),
    "sm_100": (("lockstep", "1"),),
}


class Portion(NamedTuple):
    """A process of pytest: what it is called, its arguments and its environment."""

    name: str
    arguments: tuple[str, ...]
    env: dict[str, str]


def portions(targets: Sequence[str]) -> Iterator[Portion]:
    """Yield all there is to run, the shipped codes first."""
    for target in targets:
        env = {"STR_PTX": target, "STR_PTX_CODES": "every"}
        for n in range(CODES):
            more = {"STR_PTX_PORTION": f"{n}/{CODES}"}
            name = f"codes {target} {n + 1}/{CODES}"
            yield Portion(name, ("tests/ptx/test_executed_codes.py",), env | more)
        yield Portion(f"mutants {target}", ("tests/ptx/test_executed_mutants.py",), env)
    files = sorted((ROOT / "tests").rglob("*.py"))
    marked = [path for path in files if "mark.gpu" in path.read_text("utf-8")]
    for target in targets:
        for order, noise in WAYS[target]:
            env = {"STR_PTX": target, "STR_PTX_ORDER": order, "STR_PTX_NOISE": noise}
            for path in marked:
                name = f"gpu {target} {order} {noise or 'exact'} {path.stem}"
                arguments = (str(path.relative_to(ROOT)), "-m", "gpu and not slow")
                yield Portion(name, arguments, env)


def sources() -> str:
    """Identify all that a result depends on."""
    found = hashlib.sha256()
    for pattern in ("str_kernels/op/**/*.py", "bench/ptx/*.py", "bench/compiled/*.py", "tests/*.py",
                    "tests/rows/*.py", "tests/ptx/*.py"):  # fmt: skip
        for path in sorted(ROOT.glob(pattern)):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def run(portion: Portion, seconds: float) -> dict[str, Any]:
    """Run a portion and return its row."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-rf"]
    start = time.monotonic()
    try:
        done = subprocess.run(
            [*command, *portion.arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **portion.env},
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return {"portion": portion.name, "status": "no time"}
    counts = {
        what: int((re.findall(rf"(\d+) {what}", done.stdout) or ["0"])[-1])
        for what in ("passed", "failed", "skipped")
    }
    good = done.returncode == 0 or (done.returncode == 5 and not counts["failed"])  # 5: none there
    return {
        "portion": portion.name,
        "status": "passed" if good else "failed",
        **counts,
        "seconds": round(time.monotonic() - start, 1),
        "failures": re.findall(r"^(?:FAILED|ERROR) (.*)", done.stdout, re.M)[:50],
    }


def main() -> int:
    """Run what has not passed yet, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--only", default="", help="portions whose name begins so")
    parser.add_argument("--minutes", type=float, default=600.0, help="then stop")
    given = parser.parse_args()
    every = [p for p in portions(given.targets) if p.name.startswith(given.only)]
    key, end = sources(), time.monotonic() + 60 * given.minutes
    LINES.parent.mkdir(exist_ok=True)
    lines = LINES.read_text("utf-8").splitlines() if LINES.exists() else []
    known = {row["portion"]: row for row in map(json.loads, lines) if row["sources"] == key}
    total = {"passed": 0, "failed": 0, "skipped": 0}
    left = 0
    for number, portion in enumerate(every, 1):
        row = known.get(portion.name, {"status": "not run"})
        if row["status"] != "passed":
            seconds = end - time.monotonic()
            if seconds < 5:
                left += 1
                continue
            row = run(portion, seconds)
            if row["status"] == "no time":
                left += 1
                continue
            with LINES.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"sources": key, **row}) + "\n")
        for what in total:
            total[what] += row[what]
        told = ", ".join(f"{row[what]} {what}" for what in total)
        said = f"{number}/{len(every)} {portion.name}: {told}, {row['seconds']:.0f} s"
        print(said, *row["failures"], sep="\n  ", flush=True)
    told = ", ".join(f"{count} {what}" for what, count in total.items())
    print(f"{told}; {left} of {len(every)} portions not run")
    return 1 if total["failed"] or left else 0


if __name__ == "__main__":
    sys.exit(main())
