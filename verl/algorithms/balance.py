"""Partition rows by their token counts: over ranks (equal work) and over micro-batches (bounded memory).

Pure functions of the lengths, so every rank that sees the same lengths comes to the same plan without talking.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def balanced_partition(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Distribute rows over `parts` so that the token counts are close to equal.

    Longest first onto the least loaded part (Graham 1969): the largest part exceeds the smallest by one row at most.

    Args:
        lengths: tokens of each row.
        parts: number of parts, at least 1; parts may stay empty when there are fewer rows.

    Returns:
        For each part the row numbers in ascending order; together every row once.

    Raises:
        ValueError: `parts` is below 1.
    """
    if parts < 1:
        raise ValueError(f"parts={parts}; rows can only be distributed over 1 part or more")
    # Ties in tokens go to the part with fewer rows, so that empty rows spread as well.
    loads = [(0, 0, part) for part in range(parts)]
    rows: list[list[int]] = [[] for _ in range(parts)]
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        tokens, count, part = heapq.heappop(loads)
        rows[part].append(row)
        heapq.heappush(loads, (tokens + lengths[row], count + 1, part))
    return [sorted(part) for part in rows]


def pack_rows(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group rows of similar length so that no group exceeds `budget` tokens, padding included.

    Args:
        lengths: tokens of each row.
        budget: most tokens of a group, counted as rows * longest row. A row that is longer than the budget forms a
            group of its own.

    Returns:
        Groups of row numbers, longest rows first, so that a budget that does not fit fails in the first group.

    Raises:
        ValueError: `budget` is below 1.
    """
    if budget < 1:
        raise ValueError(f"budget={budget} tokens; a micro-batch needs at least 1")
    groups: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if groups and (len(groups[-1]) + 1) * longest <= budget:
            groups[-1].append(row)
        else:
            groups.append([row])
            longest = lengths[row]
    return groups
