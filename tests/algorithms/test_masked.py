import math

import pytest
import torch
from hypothesis import given, settings
from torch.testing import assert_close

from tests.algorithms.reference import Case, aggregated, cases, picked, placed, whitened
from verl.algorithms.masked import AGGREGATIONS, aggregate, masked_mean, masked_whiten, require_same_shape

NAN = float("nan")


def test_masked_mean_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, NAN], [4.0, NAN, 6.0]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    assert masked_mean(x, mask).item() == 13 / 4
    assert masked_mean(x, mask, dim=1).tolist() == [1.5, 5.0]
    assert masked_mean(x, mask, dim=0).tolist() == [2.5, 2.0, 6.0]


def test_masked_mean_of_nothing_is_zero() -> None:
    x = torch.tensor([[NAN, 1.0], [2.0, 4.0]])
    mask = torch.tensor([[0, 0], [1, 1]])
    assert masked_mean(x, mask, dim=1).tolist() == [0.0, 3.0]
    assert masked_mean(x, torch.zeros_like(mask)).item() == 0.0


def test_masked_whiten_by_hand() -> None:
    x = torch.tensor([[1.0, NAN, 3.0, 5.0]])
    mask = torch.tensor([[True, False, True, True]])
    # mean 3, sample variance 4
    assert_close(masked_whiten(x, mask), torch.tensor([[-1.0, 0.0, 0.0, 1.0]]), atol=1e-6, rtol=0)


def test_masked_whiten_of_one_entry_and_of_none_is_zero() -> None:
    x = torch.tensor([[7.0, NAN]])
    assert masked_whiten(x, torch.tensor([[True, False]])).tolist() == [[0.0, 0.0]]
    assert masked_whiten(x, torch.tensor([[False, False]])).tolist() == [[0.0, 0.0]]


def test_masked_whiten_of_equal_entries_is_zero_not_noise() -> None:
    x = torch.full((7, 31), 1000.1)
    assert masked_whiten(x, torch.ones(7, 31)).abs().max().item() == 0.0


@settings(max_examples=50, deadline=None)
@given(cases())
def test_masked_whiten_equals_the_reference(case: Case) -> None:
    x = case.normal(0)
    expected = placed(whitened(picked(x, case.mask)), case.mask)
    assert_close(masked_whiten(x, case.mask), expected, atol=1e-9, rtol=1e-9)


@settings(max_examples=50, deadline=None)
@given(cases())
def test_aggregate_equals_the_reference(case: Case) -> None:
    x = case.normal(0).masked_fill(~case.mask, NAN)
    for aggregation in AGGREGATIONS:
        expected = aggregated(picked(x, case.mask), aggregation)
        assert aggregate(x, case.mask, aggregation).item() == pytest.approx(expected, abs=1e-12)


def test_aggregate_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [10.0, NAN, NAN], [NAN, NAN, NAN]])
    mask = ~x.isnan()
    assert aggregate(x, mask, "token_mean").item() == 4.0
    assert aggregate(x, mask, "seq_mean_token_sum").item() == 8.0
    assert aggregate(x, mask, "seq_mean_token_mean").item() == 6.0
    assert aggregate(x, mask, "seq_mean_token_sum", normalizer=32.0).item() == 0.5
    assert aggregate(x, mask, "token_mean", normalizer=torch.tensor(8)).item() == 2.0


@pytest.mark.parametrize("normalizer", [None, 0, torch.tensor(0)])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregate_of_nothing_is_zero_with_zero_gradient(aggregation: str, normalizer: object) -> None:
    x = torch.full((2, 3), NAN, requires_grad=True)
    loss = aggregate(x, torch.zeros(2, 3), aggregation, normalizer)
    loss.backward()
    assert loss.item() == 0.0
    assert x.grad.tolist() == [[0.0] * 3] * 2


def test_aggregate_rejects_what_it_does_not_know() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"'mean' is unknown; use one of token_mean, seq_mean_token_sum"):
        aggregate(x, x, "mean")
    with pytest.raises(ValueError, match=r"normalizer=-1 is not a count"):
        aggregate(x, x, normalizer=-1)
    with pytest.raises(ValueError, match="not a count"):
        aggregate(x, x, normalizer=math.nan)


def test_require_same_shape_names_the_shapes() -> None:
    with pytest.raises(ValueError, match=r"a \(2, 3\), b \(2, 1\)"):
        require_same_shape(a=torch.zeros(2, 3), b=torch.zeros(2, 1))
