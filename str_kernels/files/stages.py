"""The finished stages of a long job, stored on disk with checksums under a key of the job.

A killed job that is started again repeats only the stages that are missing or damaged.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .atomic import replacing_folder, write_json
from .hashing import fault_of, json_sha256, write_manifest
from .locks import locked

Watcher = Callable[[str, int, int], None]
"""Called with a stage's name, how much of it is done and how much there is in all."""


class Stages:
    """The finished stages of one job.

    Args:
        root: the folder for the stages of all keys; made when something is written.
        key: everything that determines the results, as JSON. Stages with another key are ignored.
        say: called with a line of text when a stage is damaged.
    """

    def __init__(self, root: Path, key: Any, say: Callable[[str], None]) -> None:
        self.root = root
        self.place = root / json_sha256(key)[:16]
        self._say = say

    def result(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a finished stage's value, or compute and store it.

        Args:
            name: of the stage, unique under the key.
            make: returns a JSON value without NaN.

        Returns:
            The value as read from JSON, even if it was just computed.
        """
        path = self.place / f"{name}.json"
        if path.exists():
            try:
                return _checked(path)
            except (OSError, ValueError, KeyError, TypeError):
                self._say(f"{path} is damaged; that stage is made again")
        value = make()
        self.place.mkdir(parents=True, exist_ok=True)
        write_json(path, {"sha256": json_sha256(value), "value": value})
        return json.loads(json.dumps(value))

    def folder(self, name: str, make: Callable[[Path], None]) -> Path:
        """Return a finished stage's folder, or make it; a lock lets only one process do so.

        Args:
            name: as in `result`.
            make: writes into the empty folder that it is given.
        """
        path = self.place / name
        self.place.mkdir(parents=True, exist_ok=True)
        with locked(self.place / f"{name}.lock", wait=True):
            if path.exists():
                fault = fault_of(path)
                if fault is None:
                    return path
                self._say(f"{fault}; that stage is made again")
            with replacing_folder(path) as new:
                make(new)
                write_manifest(new)
        return path

    def remove(self) -> None:
        """Delete the stages of all keys, once the job's result is complete."""
        shutil.rmtree(self.root, ignore_errors=True)


def _checked(path: Path) -> Any:
    kept = json.loads(path.read_text(encoding="utf-8"))
    if kept["sha256"] != json_sha256(kept["value"]):
        raise ValueError("the checksum is another")
    return kept["value"]
