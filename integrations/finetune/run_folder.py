"""Where a run is while it trains, and how a killed one goes on.

A run that trains is in `NAME.unfinished` beside its place, and is renamed to NAME when everything
is written. A checkpoint counts once its manifest is there, with a SHA-256 of each of its files: one
that a kill or a full disk cut short is passed over, and one that somebody changed is refused.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...atomic import check_output, mark_folder, move_folder, write_json
from ...hashing import MANIFEST, fault_of, write_manifest
from ...locks import holder, locked

RUN = "run"
"""The marker of a finished run's folder, see `atomic`."""

_UNFINISHED = "unfinished run"
_BEGAN = "options.json"
_PREFIX = "checkpoint-"
_TRAINER_ARGUMENTS = "training_args.bin"  # a pickle that nothing reads


class RunFolder:
    """The folder of one run.

    Args:
        output: its place when it is finished.
    """

    def __init__(self, output: Path) -> None:
        output = output.resolve()  # "." has no name
        self.output = output
        self.path = output.with_name(f"{output.name}.unfinished")

    def check(self, *, overwrite: bool, resume: bool, inputs: list[Path]) -> None:
        """Refuse, before any work, a place that could not be written or must not be replaced.

        Args:
            overwrite: a finished run at the place, or an unfinished one, may be replaced.
            resume: an unfinished one is gone on with.
            inputs: what is read.

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
        # one without a whole checkpoint has nothing to go on with
        check_output(self.path, True, marker=_UNFINISHED, inputs=inputs)

    def check_unfinished(self, *, overwrite: bool, resume: bool) -> None:
        """Refuse to start over what could be gone on with.

        Args:
            overwrite: as in `check`, and so is `resume`.
            resume: go on with it.

        Raises:
            ValueError: there is a whole checkpoint of another run.
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
        """Make the folder of an unfinished run, without what another left there.

        Args:
            options: what a run that goes on with it must have in common, as JSON has it.
        """
        if self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)
        mark_folder(self.path, _UNFINISHED)
        write_json(self.path / _BEGAN, options)

    def check_same(self, options: dict[str, Any]) -> None:
        """Compare a run that goes on with how it began.

        Args:
            options: as in `begin`.

        Raises:
            ValueError: one differs; the message names it.
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
        """Rename the folder of a run that diverged, which would diverge again, and return it."""
        names = (f"{self.output.name}.diverged{end}" for end in ("", *map(str, range(2, 1000))))
        kept = next(path for path in map(self.output.with_name, names) if not path.exists())
        self.path.rename(kept)
        return kept

    def finish(self, *, overwrite: bool, keep_checkpoints: bool) -> None:
        """Rename the folder to its place; what was there, and the checkpoints, go only then.

        Args:
            overwrite: as in `check`, which is made once more: somebody may have used the place.
            keep_checkpoints: do not remove them.

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
        """Return the newest whole checkpoint, None without any.

        Raises:
            ValueError: a file of it is not what was written; the message names it.
        """
        checkpoint = self._sealed()
        if checkpoint is not None and (fault := fault_of(checkpoint)) is not None:
            raise ValueError(f"`resume` must find the checkpoint as it was written; {fault}")
        return checkpoint

    def _sealed(self) -> Path | None:
        whole = (one for one in reversed(_checkpoints(self.path)) if (one / MANIFEST).is_file())
        return next(whole, None)


def seal(checkpoint: Path) -> None:
    """Write a checkpoint's manifest, which makes it one that can be gone on with."""
    (checkpoint / _TRAINER_ARGUMENTS).unlink(missing_ok=True)
    write_manifest(checkpoint)


def _checkpoints(folder: Path) -> list[Path]:
    """Return all folders of checkpoints, whole or not, the oldest first."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.is_dir()]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix(_PREFIX)
    return int(number) if number.isdigit() else -1
