"""The folder of a run while it trains, and how a killed run is resumed.

A run trains in `NAME.unfinished` beside its final place, and is renamed to NAME when everything is
written. A checkpoint is complete once its manifest is there, with a SHA-256 of each of its files. A
checkpoint that a kill or a full disk cut short is skipped, and one that was changed is refused.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...files import (
    MANIFEST,
    check_output,
    fault_of,
    holder,
    locked,
    mark_folder,
    move_folder,
    write_json,
    write_manifest,
)

RUN = "run"
"""The marker of a finished run's folder, see `atomic`."""

_UNFINISHED = "unfinished run"
_BEGAN = "options.json"
_PREFIX = "checkpoint-"
_TRAINER_ARGUMENTS = "training_args.bin"  # a pickle that is never read


class RunFolder:
    """The folder of one run.

    Args:
        output: the folder's place when the run is finished.
    """

    def __init__(self, output: Path) -> None:
        output = output.resolve()  # "." has no name
        self.output = output
        self.path = output.with_name(f"{output.name}.unfinished")

    def check(self, *, overwrite: bool, resume: bool, inputs: list[Path]) -> None:
        """Refuse, before any work, a folder that cannot be written or must not be replaced.

        Args:
            overwrite: a finished or unfinished run in this place may be replaced.
            resume: the unfinished run is to be resumed.
            inputs: files and folders that the run reads.

        Raises:
            ValueError: the message names `output` and says why.
        """
        for given in inputs:
            if given.resolve() == self.output:
                raise ValueError(f"`output` must not be what is read; got {given}")
        check_output(self.output, overwrite, marker=RUN, inputs=inputs)
        if resume and not self.path.is_dir():
            raise ValueError(
                f"`resume` must have an unfinished run to go on with; there is no {self.path}"
            )
        if resume:
            return
        # an unfinished run without a whole checkpoint cannot be resumed, and may be replaced
        check_output(self.path, True, marker=_UNFINISHED, inputs=inputs)

    def check_unfinished(self, *, overwrite: bool, resume: bool) -> None:
        """Refuse to start over where an unfinished run could be resumed.

        Args:
            overwrite: as in `check`.
            resume: as in `check`.

        Raises:
            ValueError: there is a whole checkpoint, and neither option is on.
        """
        if self._sealed() and not (overwrite or resume):
            raise ValueError(
                f"`output` must not have an unfinished run; got {self.path}. `--resume` goes on "
                "with it, `--overwrite` starts over"
            )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs away from this folder.

        Raises:
            ValueError: another run has it.
        """
        self.output.parent.mkdir(parents=True, exist_ok=True)
        path = self.output.with_name(f".{self.output.name}.lock")
        with locked(path) as mine:
            if not mine:
                raise ValueError(f"`output` must not be written by another run; {holder(path)}")
            yield

    def begin(self, options: dict[str, Any]) -> None:
        """Make the folder of an unfinished run, and remove what an earlier run left there.

        Args:
            options: JSON values that must be the same when the run is resumed.
        """
        if self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)
        mark_folder(self.path, _UNFINISHED)
        write_json(self.path / _BEGAN, options)

    def check_same(self, options: dict[str, Any]) -> None:
        """Check that a resumed run has the options that it began with.

        Args:
            options: as in `begin`.

        Raises:
            ValueError: an option differs; the message names it.
        """
        file = self.path / _BEGAN
        if not file.is_file():  # killed before it was written: nothing was trained
            return
        before = json.loads(file.read_text(encoding="utf-8"))
        for name in sorted({*before, *options}):
            if before.get(name) != options.get(name):
                raise ValueError(
                    f"`{name}` must be as the run began, {before.get(name)!r}, to go on with it; "
                    f"got {options.get(name)!r}"
                )

    def set_aside(self) -> Path:
        """Rename the folder of a diverged run, which would diverge again if resumed; return it."""
        names = (f"{self.output.name}.diverged{end}" for end in ("", *map(str, range(2, 1000))))
        kept = next(path for path in map(self.output.with_name, names) if not path.exists())
        self.path.rename(kept)
        return kept

    def finish(self, *, overwrite: bool, keep_checkpoints: bool) -> None:
        """Rename the folder to its final place; only then remove what was there, and checkpoints.

        Args:
            overwrite: as in `check`. The place is checked again, since it may be taken by now.
            keep_checkpoints: do not remove the checkpoints.

        Raises:
            ValueError: the place is taken; everything is in the unfinished folder.
        """
        try:
            check_output(self.output, overwrite, marker=RUN)
        except ValueError as error:
            raise ValueError(f"{error}. The finished run is in {self.path}") from error
        (self.path / _BEGAN).unlink(missing_ok=True)
        mark_folder(self.path, RUN)
        move_folder(self.path, self.output)
        if not keep_checkpoints:
            for checkpoint in _checkpoints(self.output):
                shutil.rmtree(checkpoint)

    def last_checkpoint(self) -> Path | None:
        """Return the newest whole checkpoint, or None if there is none.

        Raises:
            ValueError: one of its files was changed; the message names it.
        """
        checkpoint = self._sealed()
        if checkpoint is not None and (fault := fault_of(checkpoint)) is not None:
            raise ValueError(f"`resume` must find the checkpoint as it was written; {fault}")
        return checkpoint

    def _sealed(self) -> Path | None:
        whole = (one for one in reversed(_checkpoints(self.path)) if (one / MANIFEST).is_file())
        return next(whole, None)


def seal(checkpoint: Path) -> None:
    """Write a checkpoint's manifest, which marks it as complete."""
    (checkpoint / _TRAINER_ARGUMENTS).unlink(missing_ok=True)
    write_manifest(checkpoint)


def _checkpoints(folder: Path) -> list[Path]:
    """Return all folders of checkpoints, complete or not, the oldest first."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.is_dir()]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix(_PREFIX)
    return int(number) if number.isdigit() else -1
