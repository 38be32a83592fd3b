import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.algorithms.reference import Case, cases, picked, placed
from verl.algorithms.weights import self_normalized_weights, truncated_importance_weights

NAN = float("nan")
INF = float("inf")
ONE_ULP = {"atol": 1e-12, "rtol": 1e-12}


def test_token_weights_by_hand() -> None:
    ratios = torch.tensor([[0.5, 3.0, NAN], [1.0, NAN, 2.0]])
    weights, stats = truncated_importance_weights(ratios.log(), torch.zeros(2, 3), ~ratios.isnan(), cap=2.0)
    assert_close(weights, torch.tensor([[0.5, 2.0, 0.0], [1.0, 0.0, 2.0]]), atol=1e-6, rtol=0)
    assert stats["weight_mean"].item() == pytest.approx(5.5 / 4, abs=1e-6)
    assert stats["truncated_fraction"].item() == 0.25
    assert stats["rollout_kl"].item() == pytest.approx(-math.log(3) / 4, abs=1e-6)
    assert stats["log_ratio_abs_max"].item() == pytest.approx(math.log(3), abs=1e-6)


def test_sequence_weights_by_hand() -> None:
    ratios = torch.tensor([[0.5, 3.0, NAN], [1.5, NAN, 2.0], [NAN, NAN, NAN]])
    mask = ~ratios.isnan()
    weights, stats = truncated_importance_weights(ratios.log(), torch.zeros(3, 3), mask, 2.0, level="sequence")
    assert_close(weights, torch.tensor([[1.5, 1.5, 0.0], [2.0, 0.0, 2.0], [0.0] * 3]), atol=1e-6, rtol=0)
    assert stats["weight_mean"].item() == pytest.approx(1.75, abs=1e-6)
    assert stats["truncated_fraction"].item() == 0.5
    assert stats["rollout_kl"].item() == pytest.approx(-math.log(1.5 * 3) / 2, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(cases(), st.floats(0.1, 5))
def test_weights_equal_the_reference(case: Case, cap: float) -> None:
    train, rollout = (case.normal(i).masked_fill(~case.mask, NAN) for i in range(2))
    pairs = zip(picked(train, case.mask), picked(rollout, case.mask), strict=True)
    ratios = [[math.exp(t - r) for t, r in zip(*pair, strict=True)] for pair in pairs]
    expected = placed([[min(ratio, cap) for ratio in row] for row in ratios], case.mask)
    assert_close(truncated_importance_weights(train, rollout, case.mask, cap)[0], expected, **ONE_ULP)
    expected = placed([[min(math.prod(row), cap)] * len(row) for row in ratios], case.mask)
    assert_close(truncated_importance_weights(train, rollout, case.mask, cap, "sequence")[0], expected, **ONE_ULP)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_are_detached_capped_at_any_ratio_and_empty_without_actions(level: str) -> None:
    train = torch.tensor([[900.0, 900.0]], requires_grad=True)
    weights, _ = truncated_importance_weights(train, torch.zeros(1, 2), torch.ones(1, 2), 2.0, level)
    assert weights.tolist() == [[2.0, 2.0]]
    assert not weights.requires_grad
    weights, stats = truncated_importance_weights(train, torch.zeros(1, 2), torch.zeros(1, 2), 2.0, level)
    assert weights.tolist() == [[0.0, 0.0]]
    assert {value.item() for value in stats.values()} == {0.0}


def test_weights_reject_bad_arguments() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"level='turn' is unknown; use one of token, sequence"):
        truncated_importance_weights(x, x, x, 2.0, "turn")
    with pytest.raises(ValueError, match="cap=0; expected more than 0"):
        truncated_importance_weights(x, x, x, 0)
    with pytest.raises(ValueError, match="shapes differ"):
        truncated_importance_weights(x, x[:1], x, 2.0)


def test_self_normalized_weights_by_hand() -> None:
    # shares 1:3 in group 9, a single one in group 4, and far below what exp() can represent
    logprobs = torch.tensor([-5000.0, -1.0, -5000.0 + math.log(3)], dtype=torch.float64)
    weights = self_normalized_weights(logprobs, torch.tensor([9, 4, 9]))
    assert_close(weights, torch.tensor([0.25, 1.0, 0.75], dtype=torch.float64), atol=1e-9, rtol=0)


def test_self_normalized_weights_of_impossible_answers() -> None:
    logprobs = torch.tensor([-INF, -INF, -INF, -2.0])
    assert self_normalized_weights(logprobs, torch.tensor([0, 0, 1, 1])).tolist() == [0.5, 0.5, 0.0, 1.0]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-300, 0), st.integers(-1, 1)), max_size=8))
def test_self_normalized_weights_equal_the_reference(rows: list[tuple[float, int]]) -> None:
    logprobs = torch.tensor([logprob for logprob, _ in rows], dtype=torch.float64)
    group_ids = torch.tensor([group for _, group in rows], dtype=torch.int64)
    expected = [
        math.exp(logprob) / math.fsum(math.exp(other) for other, same in rows if same == group)
        for logprob, group in rows
    ]
    assert_close(self_normalized_weights(logprobs, group_ids).tolist(), expected, atol=1e-12, rtol=1e-12)


def test_self_normalized_weights_reject_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"\(2, 1\) and group_ids \(2,\); expected \(B,\)"):
        self_normalized_weights(torch.zeros(2, 1), torch.zeros(2))
    with pytest.raises(ValueError, match="holds NaN"):
        self_normalized_weights(torch.tensor([NAN]), torch.zeros(1))
