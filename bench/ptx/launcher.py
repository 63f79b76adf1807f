"""Execute Triton's launches without a GPU: compile them for one, and run the PTX on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from str_kernels.op import backends
from str_kernels.op.rows import rows_triton

from ..compiled.compiling import TARGETS, Launch, Specialized, specialize
from .arithmetic import Array
from .lanes import Noise
from .machine import Machine, Order
from .memory import Memory
from .program import Program, Unsupported, parse
from .races import Race

_BASE, _PAGE = 0x7F00_0000_0000, 4096
_OF_ROWS = ("Logits", "Grad")  # whose rows may have padding, which is read and written too
_UNWRITTEN = ("Terms", "Norm", "Stash", "Grad")  # unless told otherwise by the launch


class DataRace(RuntimeError):
    """The contents of the memory depend on the order in which threads ran."""


class Execution(NamedTuple):
    """One launch: what was compiled, and the machine that ran it."""

    code: Specialized
    machine: Machine


@dataclass
class Settings:
    """How launches are executed, and the record of the executions.

    Attributes:
        target: a GPU, by its name in `bench.compiled.compiling.TARGETS`.
        order: of the warps; see `machine`.
        seed: for a random order.
        noise: seed for the errors of approximate instructions, None for no errors.
        counting: whether sectors and bank conflicts are counted.
        edit: a function that changes a program before it runs.
        blocks_at_once: how many blocks run in lockstep.
        may_race: races that do not end the launch with an error; they are still recorded.
        executions: one for each launch, if `keep`.
        keep: whether executions are kept.
    """

    target: str = "sm_90"
    order: Order = "lockstep"
    seed: int = 0
    noise: int | None = None
    counting: bool = False
    edit: Callable[[Program], Program] | None = None
    blocks_at_once: int = 64
    may_race: Callable[[Race], bool] = lambda race: race.same
    executions: list[Execution] = field(default_factory=list)
    keep: bool = True

    @property
    def races(self) -> set[Race]:
        """Return the races of all launches."""
        return set[Race]().union(*(execution.machine.races for execution in self.executions))


@contextlib.contextmanager
def executing(settings: Settings | None = None) -> Iterator[Settings]:
    """Execute every Triton launch in the context here; Triton's interpreter must be off."""
    settings = settings or Settings()

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if not warmup:
            execute(Launch(kernel, args, kwargs), grid, settings)

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(rows_triton, "CAPS_REGISTERS", True),  # as with a torch built for CUDA
        mock.patch.object(backends, "_interpreting", lambda: True),  # the kernels run on a CPU
    ):
        yield settings


def execute(launch: Launch, grid: Any, settings: Settings) -> Execution:
    """Compile a launch and run it on its tensors, which are on the CPU.

    Raises:
        DataRace: there is a race that the settings do not allow.
        Fault: an access was wrong.
        Unsupported: the program contains something unknown.
    """
    code = specialize(launch, TARGETS[settings.target])
    program, shared = compiled(code)
    if program.threads != code.options["num_warps"] * 32:
        raise Unsupported(f"{program.threads} threads for {code.options['num_warps']} warps")
    if settings.edit is not None:
        program = settings.edit(program)
    names = launch.kernel.arg_names
    bound = dict(zip(names, launch.args, strict=False))
    bound |= {name: value for name, value in launch.kwargs.items() if name in names}
    rows = grid(bound) if callable(grid) else grid
    if any(n != 1 for n in rows[1:]):
        raise Unsupported(f"a grid of {rows}")
    given = {name: bound[name] for name, kind in code.signature.items() if kind != "constexpr"}
    tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)}
    view = View(tensors, bound.get("v_padded", 0))
    for name in _unwritten(code, tensors):
        view.forget(name)
    arguments = [view.pointers.get(name, value) for name, value in given.items()]
    arguments += [0] * (len(program.params) - len(arguments))  # scratch memory: there is none
    machine = Machine(
        program,
        arguments,
        view.memory,
        shared=shared,
        noise=None if settings.noise is None else Noise(settings.noise),
        counting=settings.counting,
    )
    for start in range(0, rows[0], settings.blocks_at_once):
        blocks = range(start, min(start + settings.blocks_at_once, rows[0]))
        machine.run(blocks, settings.order, settings.seed)
    view.copy_back()
    execution = Execution(code, machine)
    if settings.keep:
        settings.executions.append(execution)
    bad = sorted(str(race) for race in machine.races if not settings.may_race(race))
    if bad:
        raise DataRace("; ".join(bad))
    return execution


def _unwritten(code: Specialized, tensors: dict[str, Tensor]) -> list[str]:
    """Return the arguments whose memory has nothing yet that the kernel may read."""
    named = code.named
    if "HAS_NORM" not in named:
        return []
    found = [name for name in _UNWRITTEN if name in tensors and tensors[name].numel()]
    if named["HAS_NORM"]:
        found = [name for name in found if name != "Norm"]
    if "Grad" in found and tensors["Grad"].data_ptr() == tensors["Logits"].data_ptr():
        found.remove("Grad")
    return found


def compiled(code: Specialized) -> tuple[Program, int]:
    """Return the program of a launch, and its bytes of shared memory."""
    if code.key not in _programs:
        made = triton.compile(code.source, target=code.target, options=code.options)
        if made.metadata.global_scratch_size or made.metadata.num_ctas != 1:
            raise Unsupported("scratch memory, or a cluster of blocks")
        _programs[code.key] = parse(made.asm["ptx"]), made.metadata.shared
    return _programs[code.key]


_programs: dict[str, tuple[Program, int]] = {}


class View:
    """The tensors of a launch as a GPU would see them, and no other memory.

    A tensor is one piece of memory, or several if there are gaps between its rows. Addresses equal
    those of the tensors modulo 16 bytes, and a storage starts at a page, as with a GPU's allocator.
    """

    def __init__(self, tensors: dict[str, Tensor], v_padded: int) -> None:
        """Copy the tensors' bytes into a memory."""
        self.pointers = dict.fromkeys(tensors, _BASE)
        self._spans: dict[str, list[tuple[int, int]]] = {}
        storages: dict[int, tuple[int, Tensor]] = {}
        base = _BASE + _PAGE
        for name, x in tensors.items():
            if not x.numel():
                continue
            storage = x.untyped_storage()
            pointer = storage.data_ptr()
            if pointer not in storages:
                storages[pointer] = base + pointer % 16, x
                base += (-(-storage.nbytes() // _PAGE) + 2) * _PAGE
            start = storages[pointer][0] + x.storage_offset() * x.element_size()
            padded = name in _OF_ROWS and v_padded > x.shape[-1]
            self.pointers[name] = start
            spans = _rows(x, v_padded if padded else x.shape[-1])
            self._spans[name] = [(start + low, start + high) for low, high in spans]
        self._pieces: dict[int, Array] = {}
        for first, x in storages.values():
            raw = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).numpy()
            last = first + len(raw)
            every = [span for spans in self._spans.values() for span in spans]
            mine = _joined(span for span in every if first <= span[0] < last)
            self._pieces |= {low: raw[low - first : high - first] for low, high in mine}
        self.memory = Memory("global", self._pieces)

    def forget(self, name: str) -> None:
        """Treat a tensor as newly allocated."""
        for low, high in self._spans[name]:
            self.memory.forget(low, high - low)

    def copy_back(self) -> None:
        """Write the memory's bytes into the tensors."""
        for start, raw in self._pieces.items():
            raw[:] = self.memory.piece(start)


def _rows(x: Tensor, length: int) -> list[tuple[int, int]]:
    """Return where the rows of a tensor start, in bytes from its first element."""
    size = x.element_size()
    if not x.dim() or (x.is_contiguous() and length == x.shape[-1]):
        return [(0, x.numel() * size)]
    if x.dim() != 2 or x.stride(1) != 1:
        raise Unsupported(f"a tensor of shape {tuple(x.shape)} and strides {x.stride()}")
    step = x.stride(0)
    length = min(length, step) if x.shape[0] > 1 and step else length
    return [(row * step * size, (row * step + length) * size) for row in range(x.shape[0])]


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the same bytes in as few spans as possible."""
    found: list[tuple[int, int]] = []
    for low, high in sorted(spans):
        if found and low <= found[-1][1]:
            found[-1] = found[-1][0], max(high, found[-1][1])
        else:
            found.append((low, high))
    return found
