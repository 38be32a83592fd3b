"""Trajectories and their outcomes as JSON lines, for inspection, the viewer and evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from verl.errors import DataError
from verl.typed import Decoder, encode
from verl.types import RewardOutcome, Trajectory

_DECODER = Decoder(error=DataError, null_as_nan=True)


def trajectory_record(
    trajectory: Trajectory, outcome: RewardOutcome | None = None, with_ids: bool = False
) -> dict[str, Any]:
    """Return a JSON-safe record: the trajectory's fields and, if given, `outcome`.

    Args:
        with_ids: keep prompt ids and segments (token ids, log-probabilities, roles), which dominate the size; without
            them every `prompt_ids` and every turn's `segments` are empty lists.
    """
    if not with_ids:
        turns = tuple(replace(turn, segments=(), prompt_ids=()) for turn in trajectory.turns)
        trajectory = replace(trajectory, prompt_ids=(), turns=turns)
    record = encode(trajectory, nan_as_null=True)
    return record | {"outcome": encode(outcome, nan_as_null=True)}


def trajectory_from_record(record: Mapping[str, Any]) -> tuple[Trajectory, RewardOutcome | None]:
    """Invert `trajectory_record`.

    Raises:
        DataError: a key is missing, unknown or of the wrong type.
    """
    rest = {key: value for key, value in record.items() if key != "outcome"}
    trajectory = _DECODER.decode(Trajectory, rest)
    return trajectory, _DECODER.decode(RewardOutcome | None, record.get("outcome"), "outcome")


def append_trajectories(
    path: Path, items: Iterable[tuple[Trajectory, RewardOutcome | None]], with_ids: bool = False
) -> int:
    """Append one line per trajectory to a jsonl file (created if absent); return how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open("a", encoding="utf-8") as file:
        for trajectory, outcome in items:
            file.write(json.dumps(trajectory_record(trajectory, outcome, with_ids), allow_nan=False) + "\n")
            count += 1
    return count


def iter_trajectories(path: Path) -> Iterator[tuple[Trajectory, RewardOutcome | None]]:
    """Stream what `append_trajectories` wrote.

    Raises:
        DataError: the file is missing or a line is malformed (names file and line, counted from 1).
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file; expected trajectories, one JSON object per line")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            yield _parse_line(line, f"{path}:{number}")


def _parse_line(line: str, where: str) -> tuple[Trajectory, RewardOutcome | None]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as cause:
        raise DataError(f"{where}: {cause}; expected one JSON object per line") from cause
    if not isinstance(record, dict):
        raise DataError(f"{where}: {type(record).__name__}; expected a JSON object")
    try:
        return trajectory_from_record(record)
    except DataError as cause:
        raise DataError(f"{where}: {cause}") from cause
