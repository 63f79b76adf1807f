"""A sample of what `make ptx` executes, in processes whose kernels are not interpreted."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Portion(NamedTuple):
    """Some tests; and the GPU, the order of warps and the errors of ex2 and div that they get."""

    target: str
    arguments: tuple[str, ...]
    at_least: int  # tests that must have run
    order: str = ""
    noise: str = ""
    portion: str = "0/1"

    def __str__(self) -> str:
        what = Path(self.arguments[0]).stem.removeprefix("test_")
        return "-".join(filter(None, (what, self.target, self.order, self.noise)))


CODES, MUTANTS = "tests/ptx/test_executed_codes.py", "tests/ptx/test_executed_mutants.py"
KERNEL = ("tests/rows/test_triton.py", "-m", "gpu", "-k")
PORTIONS = [
    Portion("sm_90", (CODES,), 40),
    Portion("sm_90", (MUTANTS,), 18),
    Portion("sm_80", (CODES,), 8, portion="1/4"),
    Portion("sm_100", (CODES,), 8, portion="2/4"),
    # some of the tests marked gpu, as `make gpu` runs them
    Portion("sm_100", (*KERNEL, "every_kind and (held or streamed)"), 28, noise="7"),
    Portion("sm_90", (*KERNEL, "nothing_outside or far_apart or padding"), 15, order="random"),
    Portion(
        "sm_80", ("tests/rows/test_penalty_kinds.py", "-k", "triton and one_id"), 14, noise="-1"
    ),
]


@pytest.mark.skipif(
    importlib.util.find_spec("triton.backends.nvidia") is None,
    reason="this build of Triton has no compiler for NVIDIA",
)
@pytest.mark.slow
@pytest.mark.parametrize("portion", PORTIONS, ids=str)
def test_a_portion_of_what_is_executed(portion: Portion) -> None:
    env = {
        **os.environ,
        "STR_PTX": portion.target,
        "STR_PTX_ORDER": portion.order,
        "STR_PTX_NOISE": portion.noise,
        "STR_PTX_PORTION": portion.portion,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    run = subprocess.run(
        [*command, *portion.arguments], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-6000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) >= portion.at_least, run.stdout[-2000:]
