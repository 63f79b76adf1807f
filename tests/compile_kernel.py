"""Compile the Triton kernel for GPUs that are not here, and say what came out, as JSON.

    python tests/compile_kernel.py '[{"path": "linear", "dtype": "bfloat16", "arch": "90", ...}]'

A program of its own, because a process whose kernels are interpreted cannot compile them. What is
compiled is what the launcher launches: it is called with the launch itself replaced by a recorder,
and Triton's specialization (multiples of 16, ones, absent tensors) is applied to those arguments.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from str_kernels import rows_triton
from str_kernels.contracts import RowOptions

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int64": "i64"}
SPOILT = {"barrier": "            tl.debug_barrier()\n", "int64": ".to(tl.int64)"}


def module_without(text: str, folder: str) -> Any:
    """Load the kernels' source without a piece of it."""
    source = Path(rows_triton.__file__).read_text(encoding="utf-8")
    if source.count(text) != 1:
        raise SystemExit(f"{text!r} is in {source.count(text)} places")
    path = Path(folder, f"rows_triton_spoilt_{len(list(Path(folder).iterdir()))}.py")
    path.write_text(source.replace(text, ""), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"str_kernels.{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def recorded_launch(module: Any, variant: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict]:
    """Return the kernel and the arguments that `row_step_triton` launches it with."""
    launches = []

    class Recorder:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **kwargs: launches.append((args, kwargs))

    kernel, module._row_step_kernel = module._row_step_kernel, Recorder()
    rows, vocab, ids = 2, variant["vocab"], variant["ids"]
    padded = -(-vocab // 16) * 16  # as the linear path's workspace is
    dtype = getattr(torch, variant["dtype"])
    logits = torch.zeros(rows, padded if variant["path"] == "linear" else vocab, dtype=dtype)
    logits = logits[:, :vocab]
    per_row = torch.ones(rows)
    grads = {"ce_scale": per_row, "penalty_scale": per_row}
    options = RowOptions(-100, 1.0, 30.0 if variant["cap"] else 0.0)
    of_all = (
        logits,
        torch.zeros(rows, dtype=torch.int64),
        torch.arange(ids),
        torch.zeros(rows, ids) if variant["path"] == "linear" else None,
        torch.zeros(rows, ids),
        torch.ones(ids),
        options,
    )
    if variant["path"] == "linear":
        module.row_step_triton(*of_all, grad=logits, **grads)
    else:
        norm = module.row_step_triton(*of_all).norm
        if variant["path"] == "backward":
            grad = torch.empty_like(logits)
            module.row_step_triton(*of_all, norm=norm, grad=grad, **grads)
    module._row_step_kernel = kernel
    args, kwargs = launches[-1]
    return kernel, args, kwargs


def compile_variant(module: Any, variant: dict[str, Any]) -> Any:
    kernel, args, kwargs = recorded_launch(module, variant)
    names = kernel.arg_names
    named = dict(zip(names, args, strict=False))
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        value = named[name] if name in named else kwargs.pop(name)
        if name not in named or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + DTYPES[str(value.dtype).removeprefix("torch.")]
            sixteen = value.data_ptr() % 16 == 0
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
            sixteen = isinstance(value, int) and value % 16 == 0
        if sixteen:
            attributes[(i,)] = [["tt.divisibility", 16]]
    arch = variant["arch"]
    target = GPUTarget("hip", arch, 64) if arch[:3] == "gfx" else GPUTarget("cuda", int(arch), 32)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=kwargs)


def examine(compiled: Any) -> dict[str, Any]:
    """Return spills (bytes or counts), the widest loads and stores, and where the barriers are."""
    found: dict[str, Any] = {
        "narrow_products": re.findall(r".*arith\.muli .* : i32\b.*", compiled.asm["ttir"], re.M)
    }
    if "cubin" in compiled.asm:
        assembly = compiled.asm["ptx"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            usage = subprocess.run(
                [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        found["registers"] = int(re.search(r"REG:(\d+)", usage)[1])
        spills = re.findall(r"(STACK|LOCAL):(\d+)", usage)
        load, store, barrier = r"ld\.global\S*", r"st\.global\S*", r"bar\.sync|barrier\.sync"
        found["wide"] = {"loads": r"ld\.global\S*v4\.b32", "stores": r"st\.global\S*v4\.b32"}
    else:
        assembly = compiled.asm["amdgcn"]
        found["registers"] = int(re.search(r"\.vgpr_count: +(\d+)", assembly)[1])
        spills = re.findall(
            r"\.(vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size): +(\d+)", assembly
        )
        load = r"(?:global|buffer)_load_\S+"
        store, barrier = r"(?:global|buffer)_store_\S+", r"s_barrier\b"
        wide = r"(?:global|buffer)_{}_(?:dwordx4|b128)"
        found["wide"] = {"loads": wide.format("load"), "stores": wide.format("store")}
    found["spills"] = {name: int(value) for name, value in spills}
    found["wide"] = {name: len(re.findall(rx, assembly)) for name, rx in found["wide"].items()}
    # The order in which loads (l), stores (S: wide, s: narrow) and barriers (b) stand in the code.
    order = ""
    for match in re.finditer(f"(?P<l>{load})|(?P<s>{store})|(?P<b>{barrier})", assembly):
        wide_store = match["s"] and re.search(r"v4|x4|b128", match["s"])
        order += "S" if wide_store else match.lastgroup or ""
    found["order"] = order
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = []
        for variant in json.loads(sys.argv[1]):
            without = variant.get("without")
            module = rows_triton if without is None else module_without(SPOILT[without], folder)
            results.append(examine(compile_variant(module, variant)))
        print(json.dumps(results))


if __name__ == "__main__":
    main()
