#!/usr/bin/env bash
# Expected: a program that loads 64 elements and stores them touches each once, whatever its number of
# warps, since Triton lets one thread alone store an element that several hold.
# Really: only the store is left to one thread. The load has no such predicate: with 32 warps each of
# them loads all 64 elements for itself, 2,048 loads for 64 numbers. Where they lie scattered, 4 bytes of a
# sector of 32, that is as much traffic for the first cache as a row of 16,384 floats.
# Seen with triton 3.7.1, compiled for sm_90 without a GPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "triton==3.7.1" 2>/dev/null
cat >"$work/kernel.py" <<'PYTHON'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def gather(Index, From, To):
    n = tl.arange(0, 64)
    tl.store(To + n, tl.load(From + tl.load(Index + n)))


signature = {"Index": "*i32", "From": "*fp32", "To": "*fp32"}
made = triton.compile(
    ASTSource(gather, signature), target=GPUTarget("cuda", 90, 32), options={"num_warps": 32}
)
ptx = made.asm["ptx"]
loads = re.findall(r"^\s*(.*ld\.global\S*).*", ptx, re.M)
stores = re.findall(r"^\s*(.*st\.global\S*).*", ptx, re.M)
print("triton", triton.__version__, "loads:", loads, "stores:", stores)
assert len(loads) == 2 and len(stores) == 1, ptx
assert stores[0].startswith("@%p"), "every thread stores now"
assert not any(load.startswith("@") for load in loads), "some threads alone load now"
PYTHON
TRITON_CACHE_DIR="$work/cache" "$work/venv/bin/python" "$work/kernel.py"
