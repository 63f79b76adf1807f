"""Machine instructions per logit of kernels compiled for NVIDIA: what bounds one, if not memory.

    loops(cubin)    the loops of a kernel, in the order of the code, with their instructions by pipe
    whole(cubin)    the same for all its code
    shuffled(cubin) which instructions use a value from another thread
    measure()       ours and Liger's, in one run

The instructions are counted in the text of the code. That equals what runs: these loops contain no
other branch, and a predicated instruction is issued whether its predicate is true or not.
"""

from __future__ import annotations

import collections
import importlib.util
import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton

from ..results import Row
from ..steps.providers import version_of
from .compiling import TARGETS, Launch, Specialized, Variant, launch_of, specialize

PROTOCOL = (
    "triton.compile without a device, of what the launcher launches; instructions by cuobjdump "
    "-sass: of each loop over the row, by the logits that a thread loads in it (of all the code, "
    "where the row is held); and of a row's whole way through the code."
)
# What a multiprocessor of compute capability 9.0 takes in a clock, in threads (CUDA's programming
# guide, arithmetic instructions); and an H200's memory: 4.8 TB/s for 132 of them at 1.98 GHz.
PER_CLOCK = {"issue": 128, "fma": 128, "alu": 64, "mufu": 16}
BYTES_PER_CLOCK = 18.4
_PIPES = {
    "mufu": {"MUFU"},
    "fma": {"FADD", "FMUL", "FFMA", "IMAD", "HFMA2", "HADD2", "HMUL2", "FADD2", "FMUL2", "FFMA2"},
    "memory": set("LDG STG LDS STS LDC ULDC SHFL BAR REDUX CREDUX ATOMS".split()),
    "control": set("BRA EXIT BSSY BSYNC NOP WARPSYNC CALL RET".split()),
    "uniform": {"R2UR", "S2R", "CS2R"},
}


class Instruction(NamedTuple):
    """A GPU instruction: its address, its name with all suffixes, its operands."""

    address: int
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """Return the name without suffixes."""
        return self.opcode.partition(".")[0]

    @property
    def pipe(self) -> str:
        """Say which unit executes it: mufu, fma, memory, control, uniform, or alu for the rest."""
        for pipe, names in _PIPES.items():
            if self.name in names:
                return pipe
        return "uniform" if self.name.startswith("U") else "alu"

    @property
    def loaded(self) -> int:
        """Return the bytes that a thread loads with it from global memory."""
        return _width(self.opcode) if self.name == "LDG" else 0


class Counts(NamedTuple):
    """The instructions of a loop or a kernel: total, by pipe, by name, and the bytes it loads."""

    instructions: int
    pipes: dict[str, int]
    names: dict[str, int]
    loaded: int

    @classmethod
    def of(cls, code: list[Instruction]) -> Counts:
        """Count them."""
        pipes = collections.Counter(x.pipe for x in code)
        # of sm_100, which take the pipe for two results
        pipes["fma"] += sum(x.name in ("FADD2", "FMUL2", "FFMA2") for x in code)
        names = collections.Counter(x.name for x in code)
        return cls(len(code), dict(pipes), dict(names), sum(x.loaded for x in code))


def loops(cubin: bytes) -> list[Counts]:
    """Return the counts of each loop of a kernel, in the order of the code.

    A loop is the code between a branch and the earlier address that it jumps to.

    Args:
        cubin: of one kernel, `triton.compile(...).asm["cubin"]`.
    """
    code = disassemble(cubin)
    place = {x.address: number for number, x in enumerate(code)}
    found = []
    for number, x in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)$", x.operands) if x.name == "BRA" else None
        # an address after the last is a branch to itself, behind the end
        start = place.get(int(target[1], 16), number) if target else number
        if start < number:
            found.append((start, number))
    return [Counts.of(code[start : end + 1]) for start, end in sorted(found)]


def whole(cubin: bytes) -> Counts:
    """Return the counts of all the code of a kernel."""
    code = disassemble(cubin)
    while code and code[-1].name in ("NOP", "BRA"):  # what follows the end
        code.pop()
    return Counts.of(code)


def disassemble(cubin: bytes) -> list[Instruction]:
    """Return the code of one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [tool, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    form = r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)\s*(.*?)\s*;"
    found = [Instruction(int(a, 16), b, c) for a, b, c in re.findall(form, text, re.MULTILINE)]
    if not found:
        raise ValueError("no instruction in cuobjdump's output; its form has changed")
    return found


def _width(opcode: str) -> int:
    bits = re.search(r"\.[US]?(8|16|64|128)\b", opcode)
    return int(bits[1]) // 8 if bits else 4


def shuffled(cubin: bytes) -> dict[str, int]:
    """Count by name the instructions that first use a value shuffled from another thread.

    An FFMA among them is a product fused into a sum over threads: it rounds differently in each
    thread, so if several threads store the sum, the result depends on which is last.
    """
    code = disassemble(cubin)
    found: collections.Counter[str] = collections.Counter()
    for number, x in enumerate(code):
        if x.name == "SHFL":
            register = re.findall(r"\bR\d+\b", x.operands)[0]
            uses = (y for y in code[number + 1 :] if re.search(rf", -?\|?{register}\b", y.operands))
            found[next(uses).name] += 1
    return dict(found)


class Passes(NamedTuple):
    """A row's passes through a kernel: its loops, the logits of a thread in each, and the rest.

    A held row has one pass and no loop.
    """

    loops: list[tuple[Counts, float]]
    of_row: float  # instructions per logit of the whole pass
    fused: int  # products fused into sums over threads, see `shuffled`


def passes(code: Specialized, vocab: int, itemsize: int) -> Passes:
    """Compile, and count what a row of so many logits, of so many bytes each, executes."""
    cubin = triton.compile(code.source, target=code.target, options=code.options).asm["cubin"]
    threads = code.options["num_warps"] * code.target.warp_size
    all_code, every = whole(cubin), loops(cubin)
    outside = all_code.instructions - sum(loop.instructions for loop in every)
    found = [(loop, loop.loaded / itemsize) for loop in every if loop.loaded]  # else it writes 0
    total = float(outside)
    for loop, logits in found:
        blocks = vocab / (logits * threads)
        # our last block, which may be cut short, is outside the loop
        total += loop.instructions * (int(blocks) if "HELD" in code.named else math.ceil(blocks))
    if not found:
        held = code.named["BLOCK_V"] * code.named["HELD"] / threads
        found = [(all_code._replace(instructions=outside), held)]
    return Passes(found, total / (vocab / threads), shuffled(cubin).get("FFMA", 0))


_ODD, _LARGE, _HELD = 50257, 128256, 32768  # GPT-2's, Llama 3's and Mistral's vocabularies
CASES = {  # name: path, dtype, vocab, ids, everything
    "bf16": ("linear", "bfloat16", _LARGE, 64, False),
    "bf16, no penalty": ("linear", "bfloat16", _LARGE, 0, False),
    "fp16": ("linear", "float16", _LARGE, 64, False),
    "fp32": ("linear", "float32", _LARGE, 64, False),
    "bf16, all options": ("linear", "bfloat16", _LARGE, 64, True),
    "bf16, V odd, padded": ("linear", "bfloat16", _ODD, 64, False),
    "fp32, V odd, padded": ("linear", "float32", _ODD, 64, False),
    "bf16, all options, V odd, padded": ("linear", "bfloat16", _ODD, 64, True),
    "bf16, held": ("linear", "bfloat16", _HELD, 64, False),
    "bf16, all options, held": ("linear", "bfloat16", 8192, 64, True),
    "fp32, held": ("linear", "float32", 16384, 64, False),
    "bf16, forward": ("forward", "bfloat16", _LARGE, 64, False),
    "bf16, backward": ("backward", "bfloat16", _LARGE, 64, False),
    "bf16, V odd, forward": ("forward", "bfloat16", _ODD, 64, False),
    "bf16, V odd, backward": ("backward", "bfloat16", _ODD, 64, False),
}


def measure(target: str = "sm_90", kernels: Any = None) -> list[Row]:
    """Count ours on every path, and Liger's cross-entropy without a penalty.

    Args:
        target: an NVIDIA GPU of `compiling.TARGETS`.
        kernels: another module with our kernels' source; the package's when None.

    Returns:
        A row for each case, with its instructions per logit, in total and by pass, and the least
        clock cycles of a multiprocessor for the instructions and for the row's bytes.
    """
    rows = []
    for name, (path, dtype, vocab, ids, everything) in CASES.items():
        variant = Variant(path, dtype, vocab, ids, "mse", everything, target)
        launch = launch_of(variant) if kernels is None else launch_of(variant, kernels)
        row = _row(f"ours, {name}", specialize(launch, TARGETS[target]), vocab, dtype, path)
        rows.append(row | {"version": f"str-kernels {version_of('str-kernels')}"})
    if importlib.util.find_spec("liger_kernel") is None:
        return [*rows, {"what": "Liger", "why": "package liger_kernel is not installed"}]
    for name in ("bf16", "fp32", "bf16, V odd, padded"):
        _, dtype, vocab, *_ = CASES[name]
        code = specialize(_launch_of_liger(dtype, vocab), TARGETS[target])
        name = f"Liger, cross-entropy, {name.removesuffix(', padded')}"
        row = _row(name, code, vocab, dtype, "linear")
        rows.append(row | {"version": f"liger-kernel {version_of('liger-kernel')}"})
    return rows


def _row(what: str, code: Specialized, vocab: int, dtype: str, path: str) -> Row:
    itemsize = getattr(torch, dtype).itemsize
    found, of_row, fused = passes(code, vocab, itemsize)
    clocks = {"issue": 0.0, "fma": 0.0, "alu": 0.0, "mufu": 0.0}
    for counts, logits in found:
        clocks["issue"] += counts.instructions / logits / PER_CLOCK["issue"]
        for pipe in ("fma", "alu", "mufu"):
            clocks[pipe] += counts.pipes.get(pipe, 0) / logits / PER_CLOCK[pipe]
    touched = len(found) + (path != "forward")  # reads, and a write
    clocks["memory"] = touched * itemsize / BYTES_PER_CLOCK
    each = [counts.instructions / logits for counts, logits in found]
    return {
        "what": what,
        "target": f"sm_{code.target.arch}",
        "instructions": sum(each),
        "passes": " + ".join(f"{x:.1f}" for x in each),
        "of_row": of_row,
        "fused_sums": fused,
        **{f"clocks_{name}": value for name, value in clocks.items()},
        "bound": max(clocks, key=lambda name: clocks[name]),
        "why": "",
    }


def _launch_of_liger(dtype: str, vocab: int) -> Launch:
    """Return the launch of Liger's cross-entropy, forward with its gradient."""
    from liger_kernel.ops import cross_entropy as liger

    launches: list[Launch] = []
    kernel = liger.liger_cross_entropy_kernel
    recorder = mock.MagicMock()
    recorder.__getitem__.return_value = lambda *args, **kwargs: launches.append(
        Launch(kernel, args, kwargs)
    )
    logits = torch.zeros(3, vocab, dtype=getattr(torch, dtype), requires_grad=True)
    target = torch.zeros(3, dtype=torch.int64)
    with (
        mock.patch.object(liger, "liger_cross_entropy_kernel", recorder),
        mock.patch.object(liger, "infer_device_arch", lambda: "hopper"),
        mock.patch.object(liger, "is_hip", lambda: False),
    ):
        liger.cross_entropy_forward(
            logits, target, None, -100, 0.0, 0.0, "mean", None, False, False, False
        )
    return launches[0]
