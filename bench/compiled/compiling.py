"""Compile kernels for GPUs without having one, and examine the results.

What is compiled is what the launcher launches: it is called with a recorder in place of the launch
itself, and Triton specializes the recorded arguments as for a real launch (multiples of 16, ones,
absent tensors). Triton's interpreter must be off: with it there are no kernels to compile.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from str_kernels.op.contracts import RowOptions
from str_kernels.op.rows import row_kernel, rows_triton

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = ("row_step_kernel", "scatter_kernel")
ROWS = 33  # 1 and multiples of 16 are special cases
EVERYTHING = {
    "softcap": 30.0,
    "label_smoothing": 0.1,
    "z_loss_weight": 1e-4,
    "metrics": True,
}


class Variant(NamedTuple):
    """A configuration that a caller may ask for, and the GPU that it is compiled for.

    Attributes:
        path: "linear" (terms and gradient together, in our workspace), "evaluation" (its terms
            alone), "forward" and "backward" (of the logits path), or "scatter" (the second launch
            of linear on AMD).
        dtype: of the logits.
        vocab: V.
        ids: K.
        kind: of the penalty.
        everything: every option of the loss is on: cap, smoothing, z-loss, metrics.
        target: a name of TARGETS.
        large: the logits take more than 2 GB, for which AMD's compiler uses other instructions.
    """

    path: str
    dtype: str
    vocab: int
    ids: int
    kind: str
    everything: bool
    target: str
    large: bool = False

    @property
    def aligned(self) -> bool:
        """Whether every row starts at a multiple of 16 elements and has as many."""
        return self.vocab % 16 == 0 or self.padded

    @property
    def padded(self) -> bool:
        """Whether the logits are our own workspace."""
        return self.path not in ("forward", "backward")


class Launch(NamedTuple):
    """A kernel and the arguments of its launch."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Specialized(NamedTuple):
    """A launch as Triton's compiler takes it."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    target: GPUTarget

    @property
    def source(self) -> Any:
        """Return what `triton.compile` compiles."""
        return ASTSource(self.kernel, self.signature, self.constants, self.attributes)

    @property
    def named(self) -> dict[str, Any]:
        """Return the constants by name."""
        names = self.kernel.arg_names
        return {names[path[0]]: value for path, value in self.constants.items()}

    @property
    def key(self) -> str:
        """Identify the resulting code: source, specialization, options, GPU and compiler."""
        options = sorted((name, repr(value)) for name, value in self.options.items())
        whole = f"{self.source.hash()} {options} {self.target} {triton.__version__}"
        return hashlib.sha256(whole.encode()).hexdigest()[:16]


@contextlib.contextmanager
def recording(target: GPUTarget, kernels: Any = row_kernel) -> Iterator[list[Launch]]:
    """Record launches of `rows_triton` without running them; `kernels` has their source."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **kwargs: launches.append(Launch(self.kernel, args, kwargs))

    names = (*KERNELS, "THREADS_PER_WARP", "CAPS_REGISTERS", "BARRIERS_HOLD_LOADS")
    saved = {name: getattr(rows_triton, name) for name in names}
    try:
        for name in KERNELS:
            setattr(rows_triton, name, Recorder(getattr(kernels, name)))
        rows_triton.THREADS_PER_WARP = target.warp_size
        rows_triton.BARRIERS_HOLD_LOADS = target.backend == "cuda"
        rows_triton.CAPS_REGISTERS = target.backend == "cuda"
        yield launches
    finally:
        for name, value in saved.items():
            setattr(rows_triton, name, value)


def launch_of(variant: Variant, kernels: Any = row_kernel) -> Launch:
    """Return the launch that a variant results in."""
    vocab, ids, padded = variant.vocab, variant.ids, variant.padded
    width = -(-vocab // 16) * 16 if padded else vocab  # as our workspace is
    dtype = getattr(torch, variant.dtype)
    rows = 2**31 // (width * dtype.itemsize) // 2 * 2 + 3 if variant.large else ROWS
    logits = torch.empty(rows, width, dtype=dtype)[:, :vocab]  # untouched, it takes no memory
    per_row = torch.empty(rows)
    given = (
        logits,
        torch.empty(rows, dtype=torch.int64),
        torch.arange(ids),
        torch.empty(rows, ids) if padded else None,
        torch.empty(rows, ids),
        torch.ones(ids),
        RowOptions(kind=variant.kind, **(EVERYTHING if variant.everything else {})),
    )
    scales: dict[str, Any] = {"ce_scale": per_row, "penalty_scale": per_row}
    with recording(TARGETS[variant.target], kernels) as launches:
        if variant.path == "backward":
            scales.update(norm=torch.empty(2, rows), grad=torch.empty_like(logits))
            rows_triton.row_step_triton(*given, **scales)
        elif variant.path in ("forward", "evaluation"):
            rows_triton.row_step_triton(*given, padded=padded)
        else:
            rows_triton.row_step_triton(*given, grad=logits, **scales, padded=True)
    return launches[-1 if variant.path == "scatter" else 0]


def specialize(launch: Launch, target: GPUTarget) -> Specialized:
    """Specialize the arguments of a launch as Triton does before it looks into its cache."""
    kernel, args, kwargs = launch
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **kwargs, debug=False)
    # private, but nothing else says which kernel a launch compiles
    packed, signature, constants, attributes = kernel._pack_args(
        backend, {**kwargs, "debug": False}, bound, specialization, options
    )
    return Specialized(kernel, signature, constants, attributes, dict(packed.__dict__), target)


def compile_and_examine(code: Specialized) -> dict[str, Any]:
    """Compile, and return the code's properties; the time is that of a first compilation."""
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        start = time.perf_counter()
        compiled = triton.compile(code.source, target=code.target, options=code.options)
        seconds = time.perf_counter() - start
    found = {"seconds": round(seconds, 2), "shared": compiled.metadata.shared}
    return found | _examine(compiled) | _expected(code)


def _expected(code: Specialized) -> dict[str, Any]:
    """Return the bytes of rows that a thread loads and stores in the code, loops counted once."""
    named = code.named
    sizes = {"num_warps": code.options["num_warps"]}
    if "BLOCK_V" not in named:
        return sizes
    itemsize = {"bf16": 2, "fp16": 2, "fp32": 4}[code.signature["Logits"].removeprefix("*")]
    threads = sizes["num_warps"] * code.target.warp_size
    of_block = named["BLOCK_V"] * itemsize // threads
    passes = (not named["HAS_NORM"]) + named["HAS_GRAD"]
    return sizes | {
        "block": named["BLOCK_V"],
        "on_chip": named["HELD"] > 0,
        "row_loads": of_block * (named["HELD"] or 2 * passes),  # a loop and the edge
        "row_stores": of_block * named["HAS_GRAD"] * ((named["HELD"] or 2) + 1),  # and zeros
    }


def _examine(compiled: Any) -> dict[str, Any]:
    """Return registers, spills, the bytes of wide loads and stores, and the order of accesses.

    The order is that of narrow loads (l) and stores (s), wide ones (L, S: 16 bytes and more) and
    barriers (b) in the code.
    """
    if "cubin" in compiled.asm:
        found, assembly = _examine_nvidia(compiled), compiled.asm["ptx"]
        load, store = (rf"{name}\.global\S*" for name in ("ld", "st"))
        barrier = r"bar\.sync|barrier\.sync|barrier\.cta\.sync"
    else:
        assembly = compiled.asm["amdgcn"]
        found = {"registers": int(_first(r"\.vgpr_count: +(\d+)", assembly))}
        names = r"\.(vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size): +(\d+)"
        found["spills"] = {name: int(value) for name, value in re.findall(names, assembly)}
        load, store = (rf"(?:global|buffer|flat)_{name}_\S+" for name in ("load", "store"))
        barrier = r"s_barrier\b"
    order, wide = "", {"L": 0, "S": 0}
    for match in re.finditer(f"(?P<l>{load})|(?P<s>{store})|(?P<b>{barrier})", assembly):
        letter, width = match.lastgroup or "", _width(match[0])
        if letter != "b" and width >= 16:
            letter = letter.upper()
            wide[letter] += width
        order += letter
    # products that would overflow where rows are far apart
    narrow = re.findall(r".*arith\.muli .* : i32\b.*", compiled.asm["ttir"])
    wide_bytes = {"wide_loads": wide["L"], "wide_stores": wide["S"]}
    return found | wide_bytes | {"order": order, "narrow_products": narrow}


def _examine_nvidia(compiled: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [tool, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    spills = {name: int(value) for name, value in re.findall(r"(STACK|LOCAL):(\d+)", usage)}
    return {"registers": int(_first(r"REG:(\d+)", usage)), "spills": spills}


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern} in the compiler's output; its form has changed")
    return match[1]


def _width(instruction: str) -> int:
    """Return the bytes that a thread loads or stores by one instruction; 0 for a barrier."""
    nvidia = re.match(r"(?:ld|st)\.global\S*?(?:\.v(\d))?\.[bufs](\d+)$", instruction)
    if nvidia:
        return int(nvidia[1] or 1) * int(nvidia[2]) // 8
    amd = re.search(r"_(?:dwordx(\d)|(dword)$|[bu](\d+))", instruction)
    if amd:
        return int(amd[3]) // 8 if amd[3] else 4 * int(amd[1] or 1)
    return 2 if re.search(r"(short|byte)", instruction) else 0
