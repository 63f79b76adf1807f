"""Load a build of the kernel beside the package and compare the two: FOLDER kernels | importlib.

Prints the namespaces whose ops ran, the kernel's and then the package's.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import str_kernels

ROWS, VOCAB, DIM, IDS = 7, 53, 12, 3  # divided by no block size
PENALTY = {"kind": "coarse_kl", "weight": 0.3}
CLOSE = {torch.float64: {"rtol": 1e-12, "atol": 1e-14}, torch.float32: {"rtol": 1e-5, "atol": 1e-7}}


class Namespaces(TorchDispatchMode):
    """Collects the namespaces of what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.namespace)
        return func(*args, **(kwargs or {}))


def load(folder: Path, by: str) -> ModuleType:
    if by == "kernels":
        from kernels import get_local_kernel

        return get_local_kernel(folder)
    # what `kernels` does in the end
    build = folder / "build" / "torch-cpu"
    name = json.loads((build / "metadata.json").read_text(encoding="utf-8"))["id"]
    spec = importlib.util.spec_from_file_location(name, build / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def draw(dtype: torch.dtype) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(2604)
    sizes = ((ROWS, DIM), (VOCAB, DIM), (ROWS, IDS))
    *leaves, ref = (torch.randn(size, generator=generator, dtype=dtype) for size in sizes)
    target = torch.randint(VOCAB, (ROWS,), generator=generator)
    return [leaf.requires_grad_() for leaf in leaves], (target, torch.tensor([1, 30, 52]), ref)


def linear(module: ModuleType, leaves, rest, **options):
    penalty = module.SafetyPenalty(**PENALTY)
    return module.safety_linear_cross_entropy(*leaves, *rest, penalty=penalty, **options)


def logits(module: ModuleType, leaves, rest, **options):
    penalty = module.SafetyPenalty(**PENALTY)
    found = leaves[0] @ leaves[1].T
    return module.safety_cross_entropy(found, *rest, penalty=penalty, **options)


def run(module: ModuleType, way, dtype: torch.dtype, *, fullgraph: bool, **options):
    """Return the terms and the gradients."""
    leaves, rest = draw(dtype)
    call = torch.compile(way, fullgraph=True, backend="aot_eager") if fullgraph else way
    found = call(module, leaves, rest, **options)
    found.loss.sum().backward()
    return [term for term in found if term is not None], [leaf.grad for leaf in leaves]


def main(folder: Path, by: str) -> None:
    kernel = load(folder, by)
    assert Path(kernel.__file__).is_relative_to(folder), kernel.__file__
    spaces = {}
    for module in (kernel, str_kernels):  # the package once more after the kernel is there
        with Namespaces() as modes:
            for way, options in ((linear, {}), (logits, {}), (logits, {"inplace": True})):
                run(module, way, torch.float32, fullgraph=False, **options)
            run(module, linear, torch.float32, fullgraph=False, reduction="none")
        spaces[module.__name__] = sorted(modes.seen - {"aten", "prim"})
    print(json.dumps([kernel.__name__, *spaces.values()]))
    for dtype in (torch.float64, torch.float32):
        for way in (linear, logits):
            for reduction in ("mean", "none"):
                truth = run(str_kernels, way, dtype, fullgraph=False, reduction=reduction)
                for fullgraph in (False, True):
                    torch._dynamo.reset()
                    found = run(kernel, way, dtype, fullgraph=fullgraph, reduction=reduction)
                    torch.testing.assert_close(found, truth, **CLOSE[dtype])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
