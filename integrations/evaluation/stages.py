"""What an evaluation has finished, on disk: each piece with a checksum, under a key of its own."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ...atomic import write_json


def json_hash(value: Any) -> str:
    """Return the SHA-256 of a value's JSON, keys sorted."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def files_hash(paths: Iterable[Path]) -> str:
    """Return the SHA-256 over the names and contents of files, whatever their order."""
    sums = {}
    for path in paths:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while piece := file.read(1 << 20):
                digest.update(piece)
        sums[path.name] = digest.hexdigest()
    return json_hash(sums)


class EvalStages:
    """Results of finished pieces of one evaluation, so that a killed one goes on.

    Args:
        root: the folder of all stages of one output; made when something is written.
        key: everything that determines the results, as JSON. Pieces made under another key are
            not seen.
        say: called with a line of text when a piece is damaged.
    """

    def __init__(self, root: Path, key: Any, say: Callable[[str], None]) -> None:
        self.root = root
        self.folder = root / json_hash(key)[:16]
        self._say = say

    def result(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a finished piece, or make and keep it.

        Args:
            name: of the piece, unique under the key.
            make: returns a JSON value without NaN.

        Returns:
            The value as JSON gives it back, whether it was there or not.
        """
        path = self.folder / f"{name}.json"
        if path.exists():
            try:
                return _checked(path)
            except (OSError, ValueError, KeyError, TypeError):
                self._say(f"{path} is damaged; that piece is made again")
        value = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"sha256": json_hash(value), "value": value})
        return json.loads(json.dumps(value))

    def remove(self) -> None:
        """Delete the pieces of all keys: the result has what they found."""
        shutil.rmtree(self.root, ignore_errors=True)


def _checked(path: Path) -> Any:
    kept = json.loads(path.read_text(encoding="utf-8"))
    if kept["sha256"] != json_hash(kept["value"]):
        raise ValueError("the checksum is another")
    return kept["value"]
