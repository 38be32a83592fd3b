import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.algorithms.balance import balanced_partition, pack_rows

lengths_lists = st.lists(st.integers(0, 50), max_size=40)


def test_longest_rows_go_to_the_least_loaded_part() -> None:
    # 9 | 8 7 -> 9 5 | 8 7 -> the 1 goes to the 14
    assert balanced_partition([5, 9, 1, 7, 8], 2) == [[0, 1, 2], [3, 4]]


@given(lengths_lists, st.integers(1, 6))
def test_every_row_once_and_parts_differ_by_one_row_at_most(lengths: list[int], parts: int) -> None:
    partition = balanced_partition(lengths, parts)
    assert len(partition) == parts
    assert sorted(row for part in partition for row in part) == list(range(len(lengths)))
    loads = [sum(lengths[row] for row in part) for part in partition]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_packing_counts_padding() -> None:
    # 6+6 would be 12 padded; 4,4,3 are 12 padded; the 20 is alone
    assert pack_rows([4, 6, 20, 3, 4], 12) == [[2], [1, 0], [4, 3]]


@given(lengths_lists, st.integers(1, 120))
def test_groups_stay_within_the_budget_unless_one_row_exceeds_it(lengths: list[int], budget: int) -> None:
    groups = pack_rows(lengths, budget)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[row] for row in group) <= budget


@pytest.mark.parametrize("call", [lambda: balanced_partition([1], 0), lambda: pack_rows([1], 0)])
def test_nonsense_is_refused(call) -> None:
    with pytest.raises(ValueError, match="=0"):
        call()
