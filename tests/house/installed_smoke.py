"""What an installed wheel must do by itself: run by `make release-check`, outside of the checkout.

Imports the package, makes a small loss forward and backward, and reads the data that comes with it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import sys
from pathlib import Path

import torch

import str_kernels


def main() -> None:
    installed = Path(str_kernels.__file__).parent
    assert installed.is_relative_to(sys.prefix), f"{installed} is not the installed wheel's"
    assert importlib.metadata.version("str-kernels") == str_kernels.__version__
    assert not (installed / "integrations").is_symlink()
    assert (installed / "integrations" / "attach" / "hook.py").is_file()
    data = importlib.resources.files(str_kernels) / "data"
    assert (data / "refusal_templates.txt").read_text("utf-8").strip()
    assert (data / "prompts" / "anchors.jsonl").read_text("utf-8").count("\n") == 132

    generator = torch.Generator().manual_seed(2604)
    hidden, head = (torch.randn(n, 16, generator=generator) for n in (6, 101))
    target, ids = torch.arange(6), torch.tensor([3, 14, 15])
    ref = hidden @ head[ids].T + 0.5
    hidden.requires_grad_()
    terms = str_kernels.safety_linear_cross_entropy(hidden, head, target, ids, ref)
    terms.loss.backward()
    truth = torch.nn.functional.cross_entropy(hidden @ head.T, target)
    torch.testing.assert_close(terms.ce, truth.detach())
    assert terms.penalty > 0.2 and hidden.grad.norm() > 0
    print(f"str-kernels {str_kernels.__version__}: a loss of {terms.loss:.3f}, its gradient, data")


if __name__ == "__main__":
    main()
