import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verl.batch import Batch
from verl.single_controller.dispatch import Split, split


def batch_of(lengths: list[int], width: int) -> Batch:
    """Rows whose every token is the row's number + 1."""
    attention = torch.arange(width) < torch.tensor(lengths, dtype=torch.int64)[:, None]
    rows = torch.arange(1, len(lengths) + 1)[:, None] * attention
    return Batch(
        rows, attention, torch.zeros_like(attention), rows * 0, torch.zeros(rows.shape), torch.arange(len(lengths))
    )


@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(1, 5), st.integers(0, 3))
def test_answers_come_back_in_order(lengths: list[int], workers: int, padding: int) -> None:
    batch = batch_of(lengths, max(lengths) + padding)
    parts, plan = split(batch, workers)
    assert len(parts) == workers
    assert all(part.input_ids.shape[1] == max(part.lengths.tolist(), default=0) for part in parts)
    tokens, rows = plan.merge([part.input_ids for part in parts]), plan.merge([part.group_ids for part in parts])
    assert torch.equal(tokens, batch.input_ids)
    assert torch.equal(rows, batch.group_ids)
    loads = [int(part.lengths.sum()) for part in parts]
    assert max(loads) - min(loads) <= max(lengths)


def test_numbers_follow_the_stated_rule() -> None:
    plan = Split(((0, 2, 3), (1,), ()), 4)
    assert plan.merge([1.0, 5.0, 99.0]) == (3 * 1.0 + 5.0) / 4
    merged = plan.merge(
        [{"loss": 1.0, "token_count": 7, "x_sum": 1.0}, *[{"loss": 5.0, "token_count": 2, "x_sum": 0.5}] * 2]
    )
    assert merged == {"loss": 2.0, "token_count": 11, "x_sum": 2.0}


def test_mappings_of_tensors() -> None:
    plan = Split(((1,), (0,)), 3)
    merged = plan.merge([{"a": torch.ones(1, 2)}, {"a": torch.full((1, 3), 2.0)}])
    assert merged["a"].tolist() == [[2.0, 2.0, 2.0], [1.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("answers", "error", "hint"),
    [
        ([torch.ones(2, 2), torch.ones(1, 2)], ValueError, "worker 0 answered a tensor"),
        ([torch.tensor(1.0), torch.ones(1)], ValueError, "one row each"),
        ([{"a": 1}, {"b": 1}], ValueError, "different keys"),
        ([1.0, torch.ones(1, 2)], TypeError, "Tensor, float"),
        ([None, None], TypeError, "NoneType"),
    ],
)
def test_answers_that_do_not_fit_are_refused(answers: list, error: type[Exception], hint: str) -> None:
    with pytest.raises(error, match=hint):
        Split(((1,), (0,)), 2).merge(answers)
