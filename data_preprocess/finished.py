"""Work that is not done twice: a small file beside a result says what it was made from."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from verl.errors import DataError
from verl.evaluation.journal import fingerprint, write_whole


def file_state(path: Path) -> list[Any]:
    """Return what tells a file from a changed one: resolved name, size in bytes, time of modification."""
    try:
        found = path.stat()
    except OSError as cause:
        raise DataError(f"{path} cannot be read ({cause.strerror})") from cause
    return [str(path.resolve()), found.st_size, found.st_mtime_ns]


def finished(mark: Path, inputs: Any, outputs: Sequence[Path]) -> Any:
    """Return what `finish` kept for the same inputs, if all outputs are there; None otherwise, and the mark is gone.

    The mark is removed before its outputs are touched, so one never stands beside outputs of other inputs.
    """
    try:
        kept = json.loads(mark.read_text("utf-8"))
    except (OSError, ValueError):
        kept = None
    if isinstance(kept, Mapping) and kept.get("inputs") == fingerprint(inputs) and all(map(Path.is_file, outputs)):
        return kept["result"]
    mark.unlink(missing_ok=True)
    return None


def finish(mark: Path, inputs: Any, result: Any) -> None:
    """Say that the outputs are complete; `result` is JSON that the next run gets back in place of the work."""
    write_whole(mark, json.dumps({"inputs": fingerprint(inputs), "result": result}, ensure_ascii=False, indent=1))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other builds out of it.

    Raises:
        DataError: another process is at it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as cause:
            raise DataError(f"{folder} is being written by another process; wait for it, or write elsewhere") from cause
        yield
