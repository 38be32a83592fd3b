"""Lay sequences of different lengths into rows of bounded length."""

from __future__ import annotations

from collections.abc import Sequence


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute sequences over rows of at most `capacity` tokens: longest first, each into the first row with room.

    Needs at most 11/9 of the optimum plus one row (Johnson 1973).

    Args:
        lengths: tokens of each sequence; one that is longer than the capacity gets a row of its own.

    Returns:
        The sequence numbers of each row.

    Raises:
        ValueError: `capacity` is below 1.
    """
    if capacity < 1:
        raise ValueError(f"capacity={capacity} tokens; a row needs at least 1")
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((row for row, left in enumerate(room) if left >= lengths[index]), None)
        if row is None:
            rows.append([])
            room.append(capacity)
            row = len(rows) - 1
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows
