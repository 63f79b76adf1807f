"""The Python blocks of a page, to be run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def python_blocks(page: str) -> list[str]:
    """Return the blocks of a page, named from the root of the project, in order."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)


def run_block(page: str, block: str, space: dict[str, Any]) -> None:
    """Run a block with these names, which it may add to."""
    exec(compile(block, page, "exec"), space)
