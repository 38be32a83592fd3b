"""Whether two results are the same: our comparison, and those that BIRD and Spider publish.

| comparison | rows | columns | order of rows | numbers |
|---|---|---|---|---|
| `multiset` | as often as in the gold | in the gold's order | where the gold orders at its top level | nearly equal |
| `bird` | as a set | in the gold's order | ignored | equal |
| `spider` | as often as in the gold | in any order, one for all rows | where `order by` stands in the gold | equal |

`bird` is the execution accuracy of Li et al. 2023 (BIRD): Python's equality of the sets of rows, which is what
DeepRetrieval pays for, too. `spider` is that of Zhong et al. 2020 (test suites) on one database: bags of rows, equal
under one permutation of the columns, and two empty results are equal however many columns they have. NULL equals NULL
alone, and 1 equals 1.0, everywhere; a text is never a number.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Literal

from verl.types import SqlValue

Comparison = Literal["multiset", "bird", "spider"]
Row = tuple[SqlValue, ...]

TOLERANCE = 1e-6
"""Relative, and absolute below 1: sums of the same numbers in another order differ by less."""

_MOST_STEPS = 20_000
_MOST_PAIRED = 2_000


def same(
    gold: Sequence[Row], rows: Sequence[Row], comparison: Comparison, ordered: bool, tolerance: float = TOLERANCE
) -> bool:
    """Compare a result with the gold's.

    Args:
        ordered: whether the order of rows counts; `bird` never asks.
        tolerance: of numbers, for `multiset` alone.
    """
    if comparison == "bird":
        return set(gold) == set(rows)
    if len(gold) != len(rows):
        return False
    if comparison == "spider":
        return same_up_to_columns(gold, rows, ordered)
    if ordered:
        return all(rows_near(one, other, tolerance) for one, other in zip(gold, rows, strict=True))
    return same_multiset(gold, rows, tolerance)


def rows_near(one: Row, other: Row, tolerance: float) -> bool:
    """Compare two rows cell by cell, numbers with a tolerance."""
    return len(one) == len(other) and all(map(_near, one, other, [tolerance] * len(one)))


def same_multiset(gold: Sequence[Row], rows: Sequence[Row], tolerance: float) -> bool:
    """Compare two bags of rows, numbers with a tolerance.

    Rows without an equal one are paired with near ones. Where more than a few thousand such rows differ in numbers
    alone, they are paired in their order.
    """
    wanted, found = Counter(gold), Counter(rows)
    missing, extra = wanted - found, found - wanted
    if not missing and not extra:
        return True
    by_text: defaultdict[Row, tuple[list[Row], list[Row]]] = defaultdict(lambda: ([], []))
    for side, left in enumerate((missing, extra)):
        for row in left.elements():
            by_text[_but_numbers(row)][side].append(row)
    return all(_paired(some, others, tolerance) for some, others in by_text.values())


def same_up_to_columns(gold: Sequence[Row], rows: Sequence[Row], ordered: bool) -> bool:
    """Compare two results of equally many rows under some permutation of the columns, one for all rows.

    A column can only be one with the same values. The search takes the columns one by one and gives up a beginning
    that differs already; after many thousand beginnings, which no sensible result needs, it says no.
    """
    if not gold:
        return True
    width = len(gold[0])
    if len(rows[0]) != width:
        return False
    wanted, found = list(zip(*gold, strict=True)), list(zip(*rows, strict=True))
    bags = [Counter(column) for column in found]
    candidates = [[at for at in range(width) if bags[at] == Counter(column)] for column in wanted]
    steps = 0
    stack: list[tuple[int, ...]] = [()]
    while stack and steps < _MOST_STEPS:
        chosen = stack.pop()
        if chosen and not _same_beginning(wanted[: len(chosen)], [found[at] for at in chosen], ordered):
            steps += 1
            continue
        if len(chosen) == width:
            return True
        stack += [(*chosen, at) for at in reversed(candidates[len(chosen)]) if at not in chosen]
        steps += 1
    return False


def _same_beginning(wanted: Sequence[Row], found: Sequence[Row], ordered: bool) -> bool:
    one, other = zip(*wanted, strict=True), zip(*found, strict=True)
    return list(one) == list(other) if ordered else Counter(one) == Counter(other)


def _near(one: SqlValue, other: SqlValue, tolerance: float) -> bool:
    if not _is_number(one) or not _is_number(other):
        return type(one) is type(other) and one == other
    if one == other:
        return True
    try:
        return math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance)  # type: ignore[arg-type]
    except OverflowError:  # an integer beyond all floats
        return False


def _is_number(value: SqlValue) -> bool:
    return isinstance(value, int | float)


def _but_numbers(row: Row) -> Row:
    """Return what tells rows apart that no tolerance makes equal; a number is the same as any other."""
    return tuple(("number" if _is_number(cell) else type(cell).__name__) for cell in row) + tuple(
        cell for cell in row if not _is_number(cell)
    )


def _paired(some: list[Row], others: list[Row], tolerance: float) -> bool:
    """Say whether rows that differ in numbers alone can be paired so that each pair is near."""
    if len(some) != len(others):
        return False
    some, others = sorted(some, key=_numbers), sorted(others, key=_numbers)
    if all(rows_near(one, other, tolerance) for one, other in zip(some, others, strict=True)):
        return True
    if len(some) > _MOST_PAIRED:
        return False
    left = others
    for row in some:
        at = next((at for at, other in enumerate(left) if rows_near(row, other, tolerance)), None)
        if at is None:
            return False
        del left[at]
    return True


def _numbers(row: Row) -> tuple[float | int, ...]:
    return tuple(cell for cell in row if isinstance(cell, int | float))
