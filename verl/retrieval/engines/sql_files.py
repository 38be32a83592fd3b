"""Where the databases of text-to-SQL sets lie. A name from outside never leads out of the folder of databases."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

FOLDERS = (
    "",
    "database",
    "databases",
    "test_database",
    "train_databases",
    "dev_databases",
    "train/train_databases",
    "dev/dev_databases",
)
"""Where, below the folder of a set, BIRD and Spider keep their databases."""

_ENDINGS = (".sqlite", ".db")
_NAME = re.compile(r"\w[\w .-]*")


def find_database(root: Path, db_id: str, db_path: str = "") -> Path | None:
    """Return the file of a database, resolved; None if there is none inside `root`.

    Args:
        root: the folder of databases, or a folder of a set that has one (`FOLDERS`).
        db_id: its name: `NAME/NAME.sqlite` or `NAME.sqlite`.
        db_path: where it lies, if a question says so: from `root`, or from any folder above it, as published files have
            it; goes before the name.
    """
    inside = root.resolve()
    for candidate in (*_stated(root, db_path), *_named(root, db_id)):
        try:
            found = candidate.resolve()
            if found.is_relative_to(inside) and found.is_file():
                return found
        except (OSError, ValueError):  # too long a name, a loop of links, a NUL
            continue
    return None


def _stated(root: Path, db_path: str) -> Iterator[Path]:
    parts = PurePosixPath(db_path).parts
    if not db_path.endswith(_ENDINGS) or ".." in parts:
        return
    parts = parts[1:] if parts[0] == "/" else parts
    for start in range(len(parts)):
        yield root.joinpath(*parts[start:])


def _named(root: Path, db_id: str) -> Iterator[Path]:
    if not _NAME.fullmatch(db_id):
        return
    for folder in FOLDERS:
        for ending in _ENDINGS:
            yield root / folder / db_id / f"{db_id}{ending}"
            yield root / folder / f"{db_id}{ending}"
