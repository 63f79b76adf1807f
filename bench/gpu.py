"""`make gpu`: one timing table on this GPU, with nothing but torch and triton installed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch

from .speed import HEADS, PROTOCOL, device_name, measure

_TOKENS, _IDS, _PAIRS = 8192, 64, 15


def main() -> None:
    """Time every head, frozen and trainable, in bfloat16; print the rows and write them as JSON."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "bench/results")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    print(f"{device_name(device)}, torch {torch.__version__}, N {_TOKENS}, K {_IDS}, bfloat16")
    line = "{:10} {:9} {:16} {:>10} {:>14} {:>12} {:>10}"
    print(
        line.format(
            "head", "trained", "provider", "median ms", "against eager", "memory MB", "error"
        )
    )
    for name, shape in HEADS.items():
        for train_head in (False, True):
            for row in measure(shape, _TOKENS, _IDS, torch.bfloat16, train_head, _PAIRS, device):
                rows.append({"head": name, **row})
                memory, error = row["extra_memory_bytes"], row["gradient_error"]
                print(
                    line.format(
                        name,
                        "yes" if train_head else "no",
                        row["provider"],
                        f"{row['median_ms']:.1f}",
                        f"{row['against_eager']:.2f} x",
                        "" if memory is None else f"{memory / 1e6:,.0f}",
                        "" if error is None else f"{error:.1e}",
                    ),
                    flush=True,
                )
    print(PROTOCOL.format(pairs=_PAIRS))
    folder.mkdir(parents=True, exist_ok=True)
    card = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    (folder / f"{card}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
