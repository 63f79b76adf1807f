"""Locks between processes: a file that one process holds until its block or the process ends."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

_PAUSE = 0.1  # seconds between two attempts to take a lock


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a lock file for a block, and remove it afterwards.

    Args:
        path: the file, made if missing; its folder must exist.
        wait: wait until another process releases the lock.

    Yields:
        Whether this process holds the lock: always True with `wait`; else False if another process
        holds it.

    Notes:
        The lock of a killed process is released, except on Windows, where the existence of the file
        is the lock.
    """
    has_flock = _has_flock()
    take = _flocked if has_flock else _made
    while (handle := take(path)) is None and wait:
        time.sleep(_PAUSE)
    if handle is None:
        yield False
        return
    try:
        yield True
    finally:
        if has_flock:
            path.unlink(missing_ok=True)  # while still held: `_flocked` relies on it
        os.close(handle)
        if not has_flock:  # Windows cannot remove an open file
            path.unlink(missing_ok=True)


def holder(path: Path) -> str:
    """Say who has a lock, for a message."""
    return f"another process holds {path}" + (
        "" if _has_flock() else " (delete it if none is running)"
    )


def _has_flock() -> bool:
    try:
        import fcntl  # noqa: F401 - only to see whether it exists
    except ImportError:
        return False
    return True


def _flocked(path: Path) -> int | None:
    import fcntl

    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        # the previous holder may have removed the file since; a lock on that one excludes nobody
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.lstat()):
                return handle
        os.close(handle)


def _made(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return None
