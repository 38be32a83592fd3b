"""Splits of a question set as parquet files; the folder appears only when all of them are complete."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from verl.errors import DataError
from verl.records import write_questions
from verl.types import Question


def check_new(folder: Path) -> None:
    """Check, before any work is done, that nothing would be overwritten.

    Raises:
        DataError: the folder holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty; pass a new folder")


def write_splits(folder: Path, splits: Mapping[str, Sequence[Question]], prompt: Callable[[Question], str]) -> None:
    """Write `{name}.parquet` for every split.

    Args:
        folder: new, or empty.
        prompt: the user's message to the policy.

    Raises:
        DataError: a question that cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        made = Path(temporary) / "made"
        for name, questions in splits.items():
            write_questions(made / f"{name}.parquet", questions, name, prompt)
        os.replace(made, folder)
