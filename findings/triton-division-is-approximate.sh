#!/usr/bin/env bash
# Expected: `/` of two float32 in a Triton kernel is rounded to nearest, as in PyTorch, in NumPy and in
# Triton's own interpreter, so that x / x is 1 and its logarithm 0.
# Really: it compiles to div.full.f32, which NVIDIA's manual allows 2 units in the last place. A test that
# holds exactly in the interpreter may fail on a GPU. `tl.div_rn` compiles to div.rn.f32.
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
def plain(X, Y):
    n = tl.arange(0, 128)
    x = tl.load(X + n)
    tl.store(Y + n, x / x)


@triton.jit
def rounded(X, Y):
    n = tl.arange(0, 128)
    x = tl.load(X + n)
    tl.store(Y + n, tl.div_rn(x, x))


found = {}
for kernel in (plain, rounded):
    source = ASTSource(kernel, {"X": "*fp32", "Y": "*fp32"})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    found[kernel.__name__] = sorted(set(re.findall(r"\bdiv\.\S+", made.asm["ptx"])))
print("triton", triton.__version__, found)
assert found == {"plain": ["div.full.f32"], "rounded": ["div.rn.f32"]}, found
PYTHON
TRITON_CACHE_DIR="$work/cache" "$work/venv/bin/python" "$work/kernel.py"
