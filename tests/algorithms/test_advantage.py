import math
import statistics
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tests.algorithms.reference import Case, cases, gae_row, over_groups, picked, placed, whitened
from verl.algorithms.advantage import gae, grpo, reinforce_plus_plus, rloo

NAN = float("nan")
UNIT = st.floats(0, 1, allow_subnormal=False)


def test_gae_by_hand_bridges_the_observation() -> None:
    mask = torch.tensor([[False, True, True, False, False, True, False]])
    rewards = torch.tensor([[9.0, 1.0, 0.0, 9.0, 9.0, 2.0, 9.0]])
    values = torch.tensor([[8.0, 0.5, 1.0, 8.0, 8.0, 3.0, 8.0]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    # last action: 2 - 3 = -1; before it: 0 + 0.5 * 3 - 1 + 0.25 * -1 = 0.25; first: 1 + 0.5 - 0.5 + 0.25 * 0.25
    assert advantages.tolist() == [[0.0, 1.0625, 0.25, 0.0, 0.0, -1.0, 0.0]]
    assert returns.tolist() == [[0.0, 1.5625, 1.25, 0.0, 0.0, 2.0, 0.0]]


def test_gae_under_the_attention_mask_treats_observations_as_steps() -> None:
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    values = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    advantages, _ = gae(rewards, values, torch.ones(1, 4), gamma=0.5, lam=1.0)
    # with lambda 1 every token's return is the discounted score
    assert_close(advantages + values, torch.tensor([[0.125, 0.25, 0.5, 1.0]]), atol=1e-6, rtol=0)


@settings(max_examples=50, deadline=None)
@given(cases(), UNIT, UNIT)
def test_gae_equals_the_reference(case: Case, gamma: float, lam: float) -> None:
    rewards, values = (case.normal(i).masked_fill(~case.mask, NAN) for i in range(2))
    pairs = zip(picked(rewards, case.mask), picked(values, case.mask), strict=True)
    expected = placed([gae_row(r, v, gamma, lam) for r, v in pairs], case.mask)
    advantages, returns = gae(rewards, values, case.mask, gamma, lam)
    assert_close(advantages, expected, atol=1e-12, rtol=1e-12)
    assert_close(returns, expected + values.masked_fill(~case.mask, 0), atol=1e-12, rtol=1e-12)


def test_gae_keeps_the_order_of_long_sequences() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 600, generator=generator) < 0.5
    case = Case(mask, torch.zeros(3), seed=0)
    rewards, values = case.normal(0), case.normal(1)
    pairs = zip(picked(rewards, mask), picked(values, mask), strict=True)
    expected = placed([gae_row(r, v, 0.99, 0.95) for r, v in pairs], mask)
    assert_close(gae(rewards, values, mask, 0.99, 0.95)[0], expected, atol=1e-12, rtol=1e-12)


def test_gae_carries_no_gradient_and_does_not_touch_its_inputs() -> None:
    values = torch.ones(1, 2, requires_grad=True)
    rewards = torch.ones(1, 2)
    advantages, returns = gae(rewards, values, torch.tensor([[True, False]]), 1.0, 1.0)
    assert not advantages.requires_grad
    assert not returns.requires_grad
    assert rewards.tolist() == [[1.0, 1.0]]


def test_grpo_by_hand() -> None:
    scores = torch.tensor([1.0, 0.25, 3.0, 0.5])
    group_ids = torch.tensor([7, -1, 7, 7])
    mask = torch.tensor([[True, False], [True, True], [True, True], [False, False]])
    # the last sequence failed: group 7 is {1, 3}, mean 2, sample std sqrt(2); group -1 keeps its score
    unit = 1 / (math.sqrt(2) + 1e-6)
    expected = torch.tensor([[-unit, 0.0], [0.25, 0.25], [unit, unit], [0.0, 0.0]])
    assert_close(grpo(scores, group_ids, mask), expected, atol=1e-6, rtol=0)
    expected = torch.tensor([[-1.0, 0.0], [0.25, 0.25], [1.0, 1.0], [0.0, 0.0]])
    assert_close(grpo(scores, group_ids, mask, normalize_std=False), expected, atol=0, rtol=0)


def test_grpo_of_equal_scores_is_zero_not_noise() -> None:
    advantages = grpo(torch.full((7,), 0.1), torch.zeros(7, dtype=torch.int64), torch.ones(7, 3))
    assert advantages.abs().max().item() == 0.0


def test_rloo_by_hand() -> None:
    scores = torch.tensor([1.0, 2.0, 6.0, 0.25, NAN])
    group_ids = torch.tensor([0, 0, 0, 5, 0])
    mask = torch.tensor([[True], [True], [True], [True], [False]])
    assert rloo(scores, group_ids, mask).tolist() == [[-3.0], [-1.5], [4.5], [0.25], [0.0]]


@settings(max_examples=50, deadline=None)
@given(cases(max_rows=8, max_tokens=3))
def test_group_advantages_equal_the_reference(case: Case) -> None:
    def normalized(score: float, others: list[float]) -> float:
        if not others:
            return score
        return (score - statistics.fmean([score, *others])) / (statistics.stdev([score, *others]) + 1e-6)

    def centred(score: float, others: list[float]) -> float:
        return score - statistics.fmean([score, *others]) if others else score

    def left_out(score: float, others: list[float]) -> float:
        return score - statistics.fmean(others) if others else score

    scores = case.scores()
    expected = over_groups(case, normalized)
    assert_close(grpo(scores, case.group_ids, case.mask), expected, atol=1e-9, rtol=1e-9)
    expected = over_groups(case, centred)
    assert_close(grpo(scores, case.group_ids, case.mask, False), expected, atol=1e-12, rtol=1e-12)
    assert_close(rloo(scores, case.group_ids, case.mask), over_groups(case, left_out), atol=1e-12, rtol=1e-12)


def test_reinforce_plus_plus_by_hand() -> None:
    rewards = torch.tensor([[0.0, 9.0, 1.0], [2.0, 9.0, 9.0]])
    mask = torch.tensor([[True, False, True], [True, False, False]])
    # returns 0.5, 1 and 2: mean 7/6, sample variance 7/12
    expected = (torch.tensor([0.5, 1.0, 2.0]) - 7 / 6) / math.sqrt(7 / 12)
    result = reinforce_plus_plus(rewards, mask, gamma=0.5)
    assert_close(result[mask], expected, atol=1e-6, rtol=0)
    assert result[~mask].tolist() == [0.0, 0.0, 0.0]


@settings(max_examples=50, deadline=None)
@given(cases(), UNIT)
def test_reinforce_plus_plus_equals_the_reference(case: Case, gamma: float) -> None:
    rewards = case.normal(0)
    returns = [gae_row(row, [0.0] * len(row), gamma, 1.0) for row in picked(rewards, case.mask)]
    expected = placed(whitened(returns), case.mask)
    assert_close(reinforce_plus_plus(rewards, case.mask, gamma), expected, atol=1e-7, rtol=1e-7)


Estimator = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
ESTIMATORS: dict[str, Estimator] = {
    "gae": lambda scores, groups, rewards, values, mask: gae(rewards, values, mask, 0.9, 0.8)[0],
    "grpo": lambda scores, groups, rewards, values, mask: grpo(scores, groups, mask),
    "rloo": lambda scores, groups, rewards, values, mask: rloo(scores, groups, mask),
    "reinforce_plus_plus": lambda scores, groups, rewards, values, mask: reinforce_plus_plus(rewards, mask, 0.9),
}


@pytest.mark.parametrize("name", ESTIMATORS)
@settings(max_examples=25, deadline=None)
@given(cases(), st.data())
def test_padding_batch_order_and_precision_do_not_matter(name: str, case: Case, data: st.DataObject) -> None:
    estimator = ESTIMATORS[name]
    scores, rewards, values = case.scores(), case.normal(0), case.normal(1)
    expected = estimator(scores, case.group_ids, rewards, values, case.mask)

    pad = torch.nn.functional.pad
    wide = (pad(rewards, (2, 3), value=NAN), pad(values, (2, 3), value=NAN), pad(case.mask, (2, 3), value=False))
    padded = estimator(scores, case.group_ids, *wide)
    assert_close(padded, pad(expected, (2, 3)), atol=1e-12, rtol=1e-12)

    order = torch.tensor(data.draw(st.permutations(range(len(scores)))))
    shuffled = estimator(scores[order], case.group_ids[order], rewards[order], values[order], case.mask[order])
    assert_close(shuffled, expected[order], atol=1e-9, rtol=1e-9)

    single = estimator(scores.float(), case.group_ids, rewards.float(), values.float(), case.mask)
    assert single.dtype == torch.float32
    rounded = estimator(
        scores.float().double(), case.group_ids, rewards.float().double(), values.float().double(), case.mask
    )
    assert_close(single.double(), rounded, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_empty_batches_give_empty_results(shape: tuple[int, int]) -> None:
    empty, mask = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    scores, group_ids = torch.zeros(shape[0]), torch.zeros(shape[0], dtype=torch.int64)
    for estimator in ESTIMATORS.values():
        assert estimator(scores, group_ids, empty, empty, mask).shape == shape


def test_mismatched_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"token_rewards \(2, 3\), values \(2, 2\)"):
        gae(torch.zeros(2, 3), torch.zeros(2, 2), torch.zeros(2, 3), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"scores \(2, 1\), group_ids \(2,\) and mask \(2, 3\) disagree"):
        grpo(torch.zeros(2, 1), torch.zeros(2), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="disagree"):
        rloo(torch.zeros(3), torch.zeros(3), torch.zeros(2, 3))
