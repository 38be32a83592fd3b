"""Where an index is made before it is put in its place: one build at a time, and nothing half-written in the end."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from verl.errors import ConfigError

_LOCK = "lock"


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`, on its file system, which is gone afterwards whatever happens.

    A build that was killed outright leaves the folder, and the next one empties it.

    Raises:
        ConfigError: another process builds `target` just now.
        OSError: the folder cannot be made.
    """
    folder = target.with_name(f".{target.name}.building")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"save_dir {target} is being built by another process; wait until it is done") from None
        if not os.fstat(lock.fileno()).st_nlink:
            raise ConfigError(f"save_dir {target} was being built by another process; start again")
        for entry in folder.iterdir():
            if entry.name != _LOCK:
                remove(entry)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def put_in_place(new: Path, target: Path, previous: Path) -> None:
    """Rename `new` to `target`, once it is on the disk; what was there goes to `previous`, and back if that fails.

    Raises:
        OSError: it cannot be done.
    """
    for path in (*new.rglob("*"), new):
        _sync(path)
    if target.exists():
        target.rename(previous)
    try:
        new.rename(target)
    except OSError:
        if previous.exists():
            previous.rename(target)
        raise
    _sync(target.parent)


def remove(path: Path) -> None:
    """Delete a file or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
