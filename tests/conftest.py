"""What every test shares: the device, fresh but reproducible inputs, poisoned memory.

Needs pytest, torch and numpy only, so that the tests marked `gpu` run on a bare GPU machine.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch

# Without a GPU Triton's kernels run in its interpreter. With the name of one here (sm_90) they are
# compiled for it, and their PTX is executed (`make ptx`); docs/kernels.md says what each can show.
EXECUTED_FOR = os.environ.get("STR_PTX", "")
if not torch.cuda.is_available():
    if "triton" in sys.modules:
        raise pytest.UsageError("triton was imported before conftest could set TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "0" if EXECUTED_FOR else "1"
collect_ignore_glob = [] if EXECUTED_FOR else ["ptx/test_executed_*.py"]

# torch.compile in the test's own process: its pool of workers would outlive the test that made it,
# and a warning of their open pipes would fail whichever test runs when they are collected.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

pytest.register_assert_rewrite("cases", "tolerance")

from cases import SEED_VARIABLE, generator_of  # noqa: E402 - only after the lines above

# Workers of xdist inherit the environment, so all of them draw from the one seed.
os.environ.setdefault(SEED_VARIABLE, str(secrets.randbelow(2**31)))

torch.set_num_threads(1)  # one per worker: more would fight over the cores


def pytest_report_header() -> str:
    how = f"executed as PTX for {EXECUTED_FOR}" if EXECUTED_FOR else "interpreted"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {how}"
    return (
        f"str-kernels: inputs drawn from {SEED_VARIABLE}={os.environ[SEED_VARIABLE]} "
        f"(set it to draw them again); kernels on {device}"
    )


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """Random numbers of this test in this session; drawn on the CPU, the same for any device."""
    seed = os.environ[SEED_VARIABLE]
    request.node.add_report_section("setup", "seed", f"{SEED_VARIABLE}={seed}")
    return generator_of(seed, request.node.nodeid)


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_and_poison(*args: Any, **kwargs: Any) -> torch.Tensor:
        memory = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if not caller.startswith("str_kernels"):
            return memory
        with torch.no_grad():
            if memory.is_floating_point():
                memory.fill_(torch.nan)
            elif memory.dtype != torch.bool:
                memory.fill_(torch.iinfo(memory.dtype).max)
        return memory

    return allocate_and_poison


@pytest.fixture(autouse=True, scope="session")
def executed() -> Iterator[None]:
    """Execute kernels' PTX where STR_PTX names a GPU, in the order and with the errors asked."""
    if not EXECUTED_FOR:
        yield
        return
    from bench.ptx.launcher import Settings, executing

    noise = os.environ.get("STR_PTX_NOISE")
    settings = Settings(
        target=EXECUTED_FOR,
        order=os.environ.get("STR_PTX_ORDER") or "lockstep",
        noise=int(noise) if noise else None,
        keep=False,
    )
    with executing(settings):
        yield


@pytest.fixture(autouse=True)
def inf_and_nan_are_values() -> Iterator[None]:
    """Let Triton's interpreter compute with them in silence, as a GPU does; numpy would warn."""
    with numpy.errstate(all="ignore"):
        yield


@pytest.fixture
def clean_memory() -> None:
    """Switch the poison off: torch.compile is to trace what users run."""


# torch's own fill_uninitialized_memory would do, but it needs use_deterministic_algorithms, which
# makes other kernels run (and cuBLAS refuse to) than the ones users get.
ALLOCATORS = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))


@pytest.fixture(autouse=True)
def poison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill with NaN what the package allocates and torch leaves as it was: an unwritten read shows.

    Only in str_kernels: other libraries' habits are not on trial here.
    """
    if "clean_memory" not in request.fixturenames:
        for owner, name in ALLOCATORS:
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
