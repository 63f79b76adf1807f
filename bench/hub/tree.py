"""The tree that kernel-builder publishes, and its builds, which `kernels.get_local_kernel` loads.

The sources are those of str_kernels/op, unchanged, since all their imports are relative. Only the
namespace of the ops differs: each build has an `_ops.py` as kernel-builder writes it, with a hash
of the sources in the name. So the kernel, another version of it and the installed package can be
loaded in one process.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

import str_kernels
from str_kernels import op
from str_kernels.files.atomic import check_output, replacing_folder

_MARKER = "hub"
_PROJECT = Path(__file__).with_name("project")
_DEFAULT = Path(__file__).parents[2] / "build" / "hub"

_INIT = '''"""Cross-entropy fused with a penalty on the drift of safety tokens."""

from .op import (
    {imports},
)

__all__ = [
    {names},
]
'''
_OPS = '''"""The namespace of this build's ops, which no other copy has."""

import torch

ops = torch.ops.{namespace}


def add_op_namespace_prefix(op_name: str) -> str:
    """Return an op's full name."""
    return f"{namespace}::{{op_name}}"
'''


def write_tree(output: Path) -> list[Path]:
    """Write the tree, replacing an older one.

    Args:
        output: the folder; missing, empty, or written by this function before.

    Returns:
        The folders of the builds, one per backend.

    Raises:
        ValueError: the folder holds something else.
    """
    general = tomllib.loads((_PROJECT / "build.toml").read_text(encoding="utf-8"))["general"]
    check_output(output, overwrite=True, marker=_MARKER)
    with replacing_folder(output, marker=_MARKER) as folder:
        sources = _write_project(folder, general["name"].replace("-", "_"))
        builds = [
            _write_build(folder, sources, general, backend) for backend in general["backends"]
        ]
    return [output / build.relative_to(folder) for build in builds]


def _write_project(folder: Path, module: str) -> Path:
    """Write what kernel-builder reads, and return the folder of the sources."""
    (folder / "tests").mkdir(parents=True)
    for name in ("build.toml", "CARD.md", "flake.nix"):
        shutil.copyfile(_PROJECT / name, folder / name)
    (folder / "tests" / "__init__.py").touch()
    shutil.copyfile(_PROJECT / "kernel_tests.py", folder / "tests" / "test_losses.py")
    sources = folder / "torch-ext" / module
    shutil.copytree(
        Path(op.__file__).parent, sources / "op", ignore=shutil.ignore_patterns("__pycache__")
    )
    names = [name for name in str_kernels.__all__ if name in op.__all__]
    listed = {
        "imports": ",\n    ".join(names),
        "names": ",\n    ".join(f'"{name}"' for name in names),
    }
    (sources / "__init__.py").write_text(_INIT.format(**listed), encoding="utf-8")
    return sources


def _write_build(folder: Path, sources: Path, general: dict[str, Any], backend: str) -> Path:
    """Write the build for one backend, as kernel-builder would of these sources."""
    build = folder / "build" / f"torch-{backend}"
    shutil.copytree(sources, build)
    unique = hashlib.sha256(json.dumps(_hashes(sources)).encode()).hexdigest()[:12]
    namespace = f"_{sources.name}_{backend}_{unique}"
    (build / "_ops.py").write_text(_OPS.format(namespace=namespace), encoding="utf-8")
    metadata = {
        "name": general["name"],
        "id": namespace,
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": _hashes(build)},
    }
    (build / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return build


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in files
    }


def hub(
    output: Annotated[
        Path, typer.Option(help="The folder; an older tree there is replaced.")
    ] = _DEFAULT,
) -> None:
    """Write the loss as a kernel of the Hugging Face `kernels` library: one build per backend."""
    try:
        builds = write_tree(output)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    made = ", ".join(path.name for path in builds)
    print(f"{output}: the project of kernel-builder; builds {made}")
