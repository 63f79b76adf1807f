"""What the compiled kernels execute per logit, and what bounds them on a GPU.

The PTX is executed on the CPU (bench/ptx), and every instruction, sector and barrier is counted;
before that, its results are compared with float64. SASS is read, not executed. No time is measured.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from str_kernels.op.contracts import RowOptions
from str_kernels.op.rows.rows_torch import row_step_torch
from str_kernels.op.rows.rows_triton import row_step_triton

from .. import tables
from ..ptx.counting import SECTOR, WARP
from ..ptx.launcher import Execution, Settings, executing
from ..results import Row, origin
from ..steps.providers import version_of
from ..tables import Column
from .amdgcn import amdgcn_of, amdgcn_per_logit
from .compiling import EVERYTHING, TARGETS, Variant, launch_of, specialize
from .sass import PER_CLOCK, Passes, passes

PROTOCOL = (
    "PTX of {target} executed on a CPU, {rows} rows, and its results compared with float64; "
    "instructions of a thread per logit; SASS by cuobjdump, of the loops (of the whole code where "
    "a row is held). No time was measured."
)
ROWS = 2
IDS = 64


class Device(NamedTuple):
    """A GPU's published properties.

    Attributes:
        target: the name of the compilation target.
        bytes: that its memory moves per second.
        lanes: instructions of single threads that it can issue per second.
        source: where the numbers are from.
    """

    target: str
    bytes: float
    lanes: float
    source: str


# An NVIDIA SM makes 128 multiply-adds of float32 a clock, two operations each, and issues as many
# instructions; a CU of CDNA 3 makes 128 with packed instructions, of which it issues 64 lanes.
DEVICES = {
    "H100": Device("sm_90", 3.35e12, 67e12 / 2, "NVIDIA H100 data sheet, SXM"),
    "H200": Device("sm_90", 4.8e12, 67e12 / 2, "NVIDIA H200 data sheet, SXM"),
    "B200": Device("sm_100", 8.0e12, 75e12 / 2, "NVIDIA DGX and HGX B200 data sheets, an eighth"),
    "MI300X": Device("gfx942", 5.3e12, 163.4e12 / 4, "AMD Instinct MI300X data sheet"),
}
_TRANSCENDENTAL = 4  # a CU makes a quarter of the lanes' exponentials and reciprocals

CASES = (
    Variant("linear", "bfloat16", 128256, IDS, "mse", False, ""),
    Variant("linear", "bfloat16", 128256, IDS, "mse", True, ""),
    Variant("linear", "float32", 128256, IDS, "mse", False, ""),
    Variant("linear", "bfloat16", 32768, IDS, "mse", False, ""),
    Variant("linear", "float32", 16384, IDS, "mse", False, ""),
    Variant("evaluation", "bfloat16", 128256, IDS, "mse", False, ""),
    Variant("forward", "bfloat16", 128256, IDS, "mse", False, ""),
    Variant("backward", "bfloat16", 128256, IDS, "mse", False, ""),
    Variant("forward", "bfloat16", 50257, IDS, "mse", False, ""),
    Variant("backward", "bfloat16", 50257, IDS, "mse", False, ""),
)
LIGER_VOCABS = (128256, 32768)


def measure(targets: Iterable[str] = ("sm_90", "sm_100"), *, short: bool = False) -> list[Row]:
    """Execute and count each case, ours and Liger's, for each target.

    Args:
        targets: NVIDIA's, to compile for.
        short: only the smallest case, for a quick try.

    Returns:
        A row for each kernel and target.
    """
    cases = CASES[4:5] if short else CASES
    rows = []
    for target in targets:
        for case in cases:
            variant = case._replace(target=target)
            rows.append(_row(variant, "ours", _run_ours(variant), _amd_of(variant)))
        rows += _liger(target, LIGER_VOCABS[1:] if short else LIGER_VOCABS)
    return rows


def _run_ours(variant: Variant) -> Execution:
    """Execute one of our kernels and check its result."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, variant.dtype)
    width = -(-variant.vocab // 16) * 16 if variant.padded else variant.vocab
    logits = (3 * torch.randn(ROWS, width, generator=generator)).to(dtype)[:, : variant.vocab]
    ids = torch.randperm(variant.vocab, generator=generator)[:IDS]
    target = torch.randint(variant.vocab, (ROWS,), generator=generator)
    ref = torch.randn(ROWS, IDS, generator=generator)
    options = RowOptions(kind=variant.kind, **(EVERYTHING if variant.everything else {}))
    scales: dict[str, Any] = {"ce_scale": torch.ones(ROWS), "penalty_scale": torch.ones(ROWS)}

    def given(kind: torch.dtype) -> tuple[Any, ...]:
        return (target, ids, None, ref.to(kind), torch.ones(IDS, dtype=kind), options)

    truth_grad = torch.empty(ROWS, variant.vocab, dtype=torch.float64)
    wide = {name: x.double() for name, x in scales.items()}
    truth = row_step_torch(logits.double(), *given(torch.float64), grad=truth_grad, **wide)
    grad: Tensor | None = None
    with executing(Settings(target=variant.target, counting=True)) as settings:
        if variant.path == "linear":
            grad = logits
            row_step_triton(logits, *given(torch.float32), grad=grad, **scales, padded=True)
        elif variant.path == "backward":
            grad = torch.empty_like(logits)
            norm = truth.norm.float()
            row_step_triton(logits, *given(torch.float32), norm=norm, grad=grad, **scales)
        else:
            found = row_step_triton(logits, *given(torch.float32), padded=variant.padded)
            torch.testing.assert_close(found.ce.double(), truth.ce, rtol=3e-6, atol=3e-6)
    if grad is not None:
        _compare(grad, truth_grad)
    return settings.executions[0]


def _compare(grad: Tensor, truth: Tensor) -> None:
    """Check a gradient to within one rounding of its dtype and a few of float32."""
    step = torch.finfo(grad.dtype).eps
    atol = 1e-6 * float(truth.abs().max())
    torch.testing.assert_close(grad.double(), truth, rtol=max(step, 3e-6), atol=atol)


def _liger(target: str, vocabs: Iterable[int]) -> list[Row]:
    """Execute Liger's cross-entropy kernel as Liger launches it on such a GPU."""
    if importlib.util.find_spec("liger_kernel") is None:
        return []
    from unittest import mock

    from liger_kernel.ops import cross_entropy

    rows = []
    arch = "blackwell" if target == "sm_100" else "hopper"  # which it asks for its warps
    for vocab in vocabs:
        generator = torch.Generator().manual_seed(0)
        logits = (3 * torch.randn(ROWS, vocab, generator=generator)).bfloat16()
        labels = torch.randint(vocab, (ROWS,), generator=generator)
        exact = logits.double().requires_grad_()
        F.cross_entropy(exact, labels).backward()
        leaf = logits.clone().requires_grad_()
        with (
            mock.patch.object(cross_entropy, "infer_device_arch", lambda: arch),
            executing(Settings(target=target, counting=True)) as settings,
        ):
            given = (labels, None, -100, 0.0, 0.0, "mean", None, False)
            cross_entropy.cross_entropy_forward(leaf, *given)
        if exact.grad is None:
            raise ValueError("no gradient to compare with")
        _compare(leaf.detach(), exact.grad)  # written over the logits
        variant = Variant("loss and gradient", "bfloat16", vocab, 0, "none", False, target)
        rows.append(_row(variant, "Liger", settings.executions[0], Counter()))
    return rows


def _amd_of(variant: Variant) -> Counter[str]:
    """Return the instructions of the same launch on an AMD GPU, read from its assembly."""
    code = specialize(launch_of(variant._replace(target="gfx942")), TARGETS["gfx942"])
    made = triton.compile(code.source, target=code.target, options=code.options)
    lanes = code.options["num_warps"] * code.target.warp_size
    held = code.named["HELD"]  # blocks of it
    per_lane = code.named["BLOCK_V"] * max(1, held) / lanes
    return amdgcn_per_logit(amdgcn_of(made.asm["amdgcn"]), per_lane, bool(held))


def _by_pipe(found: Passes) -> Counter[str]:
    """Return the machine instructions per logit on each pipe, and all of them as "issue"."""
    counted: Counter[str] = Counter()
    for counts, logits in found.loops:
        counted["issue"] += counts.instructions / logits  # type: ignore[assignment] # no integer
        for pipe, number in counts.pipes.items():
            counted[pipe] += number / logits  # type: ignore[assignment]
    return counted


def _row(variant: Variant, kernel: str, execution: Execution, amd: Counter[str]) -> Row:
    """Return what a launch executed per logit, and what bounds it on each GPU."""
    code, machine = execution
    named, counts, program = code.named, machine.counts, machine.program
    block = named.get("BLOCK_V") or named["BLOCK_SIZE"]
    held = bool(named.get("HELD", block >= variant.vocab))
    itemsize = getattr(torch, variant.dtype).itemsize
    sass = _by_pipe(passes(code, variant.vocab, itemsize))
    logits = ROWS * variant.vocab
    row = origin("cpu", PROTOCOL.format(target=variant.target, rows=ROWS)) | {
        "kernel": kernel,
        "version": version_of("liger-kernel" if kernel == "Liger" else "str-kernels"),
        **variant._asdict(),
        "threads": program.threads,
        "block": block,
        "held": held,
        "ptx": sum(counts.by_kind(program).values()) * WARP / logits,
        "sass": sass["issue"],
        "barriers": counts.barriers / ROWS,
        "conflicts": sum(counts.conflicts.values()) / ROWS,
    }
    for kind, count in counts.by_kind(program).items():
        row[f"ptx {kind}"] = count * WARP / logits
    for pipe in ("fma", "alu", "mufu", "memory"):
        row[f"sass {pipe}"] = sass[pipe]
    row |= {f"gfx942 {what}": count for what, count in amd.items()}
    for what in ("ld", "st"):
        mine = [pc for pc in counts.sectors if program.code[pc].opcode.startswith(what)]
        row[f"{what} bytes"] = sum(counts.bytes[pc] for pc in mine) / logits
        row[f"{what} sectors"] = sum(counts.sectors[pc] for pc in mine) * SECTOR / logits
        row[f"{what} fetched"] = sum(counts.fetched[pc] for pc in mine) * SECTOR / logits
    row["used"] = (row["ld bytes"] + row["st bytes"]) / (row["ld sectors"] + row["st sectors"])
    row["moved"] = moved = row["ld fetched"] + row["st fetched"]
    for name, device in DEVICES.items():
        counted = amd if device.target == "gfx942" else sass
        if device.target == variant.target or (name == "MI300X" and amd):
            row |= bounds(name, device, moved, counted)
    return row


def bounds(name: str, device: Device, moved: float, counted: Counter[str]) -> Row:
    """Return the least picoseconds per logit for memory and instructions, and the larger one.

    Args:
        name: of the device.
        device: its published numbers.
        moved: bytes per logit, in whole sectors.
        counted: instructions per logit on each pipe; "vector" and "transcendental" for AMD.
    """
    if "vector" in counted:
        times = {
            "issue": counted["vector"] / device.lanes,
            "transcendental": _TRANSCENDENTAL * counted["transcendental"] / device.lanes,
        }
    else:
        clock = device.lanes / PER_CLOCK["issue"]  # of all SMs
        times = {pipe: counted[pipe] / clock / rate for pipe, rate in PER_CLOCK.items()}
    worst = max(times, key=lambda pipe: times[pipe])
    memory = moved / device.bytes
    return {
        f"{name} memory ps": 1e12 * memory,
        f"{name} pipe": worst,
        f"{name} pipe ps": 1e12 * times[worst],
        f"{name} bound": "memory" if memory >= times[worst] else worst,
        f"{name} ratio": times[worst] / memory,
        f"{name} source": device.source,
    }


def show(rows: list[Row]) -> None:
    """Print the counts of each kernel, then what bounds it on each GPU."""
    shown = [row | {"name": _name(row)} for row in rows]
    one, whole = "{:.1f}".format, "{:.0f}".format
    for target in dict.fromkeys(row["target"] for row in shown):
        mine = [row for row in shown if row["target"] == target]
        tables.show(
            f"{target}: executed for each logit",
            mine,
            [
                Column("kernel", "name"),
                Column("V", "vocab"),
                Column("PTX", "ptx", one),
                Column("SASS", "sass", one),
                Column("alu", "sass alu", one),
                Column("mufu", "sass mufu", one),
                Column("bytes", "moved", "{:.2f}".format),
                Column("used", "used", "{:.0%}".format),
                Column("bars", "barriers", whole),
            ],
        )
        named = [name for name in DEVICES if any(f"{name} bound" in row for row in mine)]
        for row in mine:
            for name in named:
                if f"{name} bound" in row:
                    row[name] = f"{row[f'{name} bound']} {row[f'{name} ratio']:.2f}"
        tables.show(
            f"{target}: what bounds it, and the busiest pipe's time over the memory's",
            mine,
            [Column("kernel", "name"), Column("V", "vocab"), *(Column(n, n) for n in named)],
        )
    tables.say(
        "alu, mufu: of the SASS, on these pipes. bytes: of the 32-byte sectors that a block asks "
        "for, its warps together; used: what a warp asks for of its own; bars: barriers of a row. "
        + "; ".join(f"{name}: {device.source}" for name, device in DEVICES.items())
    )
    tables.say(rows[0]["protocol"].replace(f"PTX of {rows[0]['target']}", "PTX"))


def _name(row: Row) -> str:
    dtype = row["dtype"].replace("bfloat", "bf").replace("float", "fp")
    options = ", all options" if row["everything"] else ""
    return f"{row['kernel']}, {row['path']}{' held' if row['held'] else ''} {dtype}{options}"
