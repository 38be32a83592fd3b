"""The marks of an index's files in its `index.json`: whether a file is still the one that was built."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from verl.errors import DataError
from verl.retrieval.engine import IndexInfo
from verl.retrieval.file_mark import file_mark


def marks(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Return the marks of `files` by their names relative to `folder`; see `file_mark`."""
    return {str(path.relative_to(folder)): file_mark(path) for path in sorted(files)}


def check_marks(folder: Path, info: IndexInfo) -> None:
    """Compare the files with what `info` says of them; the `index.json` of an older index says nothing.

    Raises:
        DataError: a file is missing or another one.
    """
    for name, mark in info.files.items():
        try:
            found = marks(folder, [folder / name])[name]
        except OSError as error:
            raise DataError(f"index {folder} is damaged: {error}; build it again with --overwrite") from error
        if found != mark:
            raise DataError(
                f"index {folder} is damaged: {name} changed since it was built; build it again with --overwrite"
            )
