import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.toys import toy_batch
from verl.workers.micro_batch import mini_batches, rank_micro_batches, take

CPU = torch.device("cpu")


def test_mini_batches_are_nearly_equal_and_cover_each_epoch() -> None:
    batch = toy_batch(rows=11)
    sizes = [len(rows) for rows in mini_batches(batch, 5, 1, None)]
    assert sizes == [4, 4, 3]
    rows = list(mini_batches(batch, 5, 2, torch.Generator().manual_seed(0)))
    first, second = ([row for part in epoch for row in part] for epoch in (rows[:3], rows[3:]))
    assert sorted(first) == sorted(second) == list(range(11))
    assert first != second and first != list(range(11))


def test_one_mini_batch_by_default() -> None:
    assert list(mini_batches(toy_batch(rows=4), None, 1, None)) == [[0, 1, 2, 3]]


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=20),
    st.integers(1, 4),
    st.integers(1, 100),
    st.randoms(use_true_random=False),
)
def test_ranks_share_a_mini_batch_in_lockstep(lengths: list[int], size: int, budget: int, random) -> None:
    rows = random.sample(range(len(lengths)), random.randint(1, len(lengths)))
    plans = [rank_micro_batches(lengths, rows, rank, size, budget) for rank in range(size)]
    assert len({len(plan) for plan in plans}) == 1
    assert sorted(row for plan in plans for group in plan for row in group) == sorted(rows)


def test_take_trims_and_keeps_every_tensor() -> None:
    batch = toy_batch()
    shortest = int(batch.lengths.argmin())
    taken = take(batch, [shortest], CPU)
    width = int(batch.lengths[shortest])
    assert taken.input_ids.tolist() == [batch.input_ids[shortest, :width].tolist()]
    assert taken.returns.tolist() == [batch.returns[shortest, :width].tolist()]


def test_no_rows_are_one_row_of_padding() -> None:
    blank = take(toy_batch(), [], CPU)
    assert blank.input_ids.shape == (1, 2)
    assert not blank.attention_mask.any() and not blank.action_mask.any()
