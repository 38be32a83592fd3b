from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.algorithms.packing import first_fit_decreasing
from verl.algorithms.weighted_nll import token_coefficients

# Two examples: losses 1, 2, 3 with weight 0.5, and 4 with weight 2.
WEIGHTS, LEARNED, SUMS = [0.5, 2.0], [3, 1], [6.0, 4.0]


@pytest.mark.parametrize(
    ("reduction", "micro_batch", "expected"),
    [
        ("token_mean", None, (0.5 * 6 + 2 * 4) / 4),
        ("sequence_mean", None, (0.5 * 2 + 2 * 4) / 2),
        ("released_v1", None, 4 * (0.5 * 2 + 2 * 4)),
        # Micro-batches of one, whose sums are averaged: (4 * 0.5 * 2 + 4 * 2 * 4) / 2
        ("released_v1", 1, 18.0),
    ],
)
def test_the_loss_by_hand(reduction, micro_batch, expected: float) -> None:
    coefficients = token_coefficients(reduction, WEIGHTS, LEARNED, micro_batch)
    assert math.fsum(c * s for c, s in zip(coefficients, SUMS, strict=True)) == pytest.approx(expected, abs=1e-12)


def test_an_example_without_learned_tokens_counts_as_one_of_the_batch() -> None:
    assert token_coefficients("sequence_mean", [1.0, 1.0], [2, 0]) == [0.25, 0.0]
    assert token_coefficients("token_mean", [1.0], [0]) == [1.0]


@given(st.lists(st.integers(1, 20), max_size=30), st.integers(1, 25))
def test_rows_hold_everything_once_and_no_more_than_fits(lengths: list[int], capacity: int) -> None:
    rows = first_fit_decreasing(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in row) for row in rows]
    assert all(load <= capacity or len(row) == 1 for load, row in zip(loads, rows, strict=True))
    # No sequence of a later row would have fitted into an earlier one when it came.
    roomy = [load for load in loads if load <= capacity / 2]
    assert len(roomy) <= 1


def test_first_fit_decreasing_by_hand() -> None:
    assert first_fit_decreasing([2, 5, 4, 3, 6], 10) == [[4, 2], [1, 3, 0]]
    with pytest.raises(ValueError, match="capacity=0"):
        first_fit_decreasing([1], 0)
