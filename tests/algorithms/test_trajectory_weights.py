"""Weights of trajectories by hand, and exact EM on a problem small enough to enumerate."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from verl.algorithms.weights import WEIGHTINGS, Candidates, check_weighting, self_normalized_weights, trajectory_weights

INF, NAN = math.inf, math.nan


def candidates(logprobs, tokens=None, groups=None, usable=None, rewards=None, correct=None) -> Candidates:
    n = len(logprobs)
    return Candidates(
        group_ids=torch.tensor(groups or [0] * n),
        usable=torch.tensor(usable or [True] * n),
        answer_logprobs=torch.tensor(logprobs, dtype=torch.float64),
        answer_tokens=torch.tensor(tokens or [1] * n),
        rewards=torch.tensor(rewards or [0.0] * n),
        correct=torch.tensor(correct or [False] * n),
    )


def test_paper_weights_by_hand() -> None:
    # Question 0: p = 0.2, 0.6, failed. Question 1: p = 0.05, 0.05.
    rows = candidates(
        [math.log(0.2), math.log(0.6), math.log(0.9), math.log(0.05), math.log(0.05)],
        groups=[0, 0, 0, 1, 1],
        usable=[True, True, False, True, True],
    )
    weights, stats = trajectory_weights("paper", rows)
    assert_close(weights, torch.tensor([0.25, 0.75, 0.0, 0.5, 0.5], dtype=torch.float64), atol=1e-12, rtol=0)
    # (1 / (0.0625 + 0.5625) + 2) / 2
    assert stats == {
        "weighted": 4.0,
        "nan": 0.0,
        "questions": 2.0,
        "dead_questions": 0.0,
        "effective_samples": pytest.approx(1.8),
    }


def test_the_length_exponent_takes_sum_or_mean() -> None:
    rows = candidates([math.log(0.04), math.log(0.2)], tokens=[2, 1])
    by_sum, _ = trajectory_weights("paper", rows, length_exponent=0.0)
    assert by_sum.tolist() == pytest.approx([0.04 / 0.24, 0.2 / 0.24])
    by_mean, _ = trajectory_weights("paper", rows, length_exponent=1.0)
    assert by_mean.tolist() == pytest.approx([0.5, 0.5])  # 0.04 ** (1/2) is 0.2


def test_the_other_weightings_by_hand() -> None:
    rows = candidates(
        [math.log(0.04), math.log(0.5), math.log(0.3)],
        tokens=[2, 1, 1],
        rewards=[0.25, 1.0, 0.5],
        correct=[False, True, True],
        usable=[True, True, False],
    )
    expected = {
        "released_v1": [0.2, 0.5, 0.0],
        "reward": [0.25, 1.0, 0.0],
        "uniform": [0.5, 0.5, 0.0],
        "rejection": [0.0, 1.0, 0.0],
    }
    assert expected.keys() | {"paper"} == set(WEIGHTINGS)
    for weighting, wanted in expected.items():
        assert trajectory_weights(weighting, rows)[0].tolist() == pytest.approx(wanted), weighting


def test_impossible_nan_and_failed_have_stated_outcomes() -> None:
    rows = candidates(
        [-INF, -INF, NAN, -1.0, -INF, -1.0, NAN],
        groups=[0, 0, 1, 1, 2, 2, 3],
        usable=[True, True, True, True, True, True, False],
    )
    weights, stats = trajectory_weights("paper", rows)
    assert weights.tolist() == [0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    assert stats["nan"] == 1  # the failed one's is not looked at
    assert stats["dead_questions"] == 2
    assert stats["questions"] == 4
    nothing, stats = trajectory_weights("paper", candidates([NAN, NAN], usable=[False, False]))
    assert nothing.tolist() == [0.0, 0.0]
    assert stats["effective_samples"] == 0


def test_an_answer_of_no_tokens_weighs_nothing_where_its_probability_is_read() -> None:
    rows = candidates([0.0, math.log(0.5)], tokens=[0, 1], rewards=[1.0, 0.0])
    assert trajectory_weights("paper", rows)[0].tolist() == [0.0, 1.0]
    assert trajectory_weights("released_v1", rows)[0].tolist() == [0.0, 0.5]
    assert trajectory_weights("reward", rows)[0].tolist() == [1.0, 0.0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(-900, 0), st.booleans()), min_size=1, max_size=20),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_weights_of_a_question_sum_to_one_or_it_is_dead(rows: list[tuple[int, float, bool]], exponent: float) -> None:
    groups, logprobs, usable = map(list, zip(*rows, strict=True))
    for weighting in ("paper", "uniform"):
        weights, stats = trajectory_weights(weighting, candidates(logprobs, None, groups, usable), exponent)
        sums = {group: sum(w for g, w in zip(groups, weights.tolist(), strict=True) if g == group) for group in groups}
        alive = {group for group, ok in zip(groups, usable, strict=True) if ok}
        assert all(sums[group] == pytest.approx(1.0 if group in alive else 0.0, abs=1e-9) for group in sums)
        assert stats["dead_questions"] == len(sums) - len(alive)


def test_one_trajectory_a_question_cannot_be_normalised() -> None:
    with pytest.raises(ValueError, match="all of them would be 1"):
        check_weighting("paper", 1)
    check_weighting("paper", 2)
    check_weighting("released_v1", 1)
    with pytest.raises(ValueError, match="use one of paper"):
        check_weighting("papre", 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="use one of paper"):
        trajectory_weights("papre", candidates([0.0]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected \(B,\)"):
        candidates([0.0, 0.0], tokens=[1])


def expected_log_likelihood(search: torch.Tensor, answer: torch.Tensor, data: dict[tuple[int, int], int]) -> float:
    """sum over (x, y) of log sum_z p(z | x) p(y | x, z), by enumeration."""
    return sum(count * math.log(float((search[x] * answer[x, :, y]).sum())) for (x, y), count in data.items())


def elbo(q: dict, search: torch.Tensor, answer: torch.Tensor, data: dict[tuple[int, int], int]) -> float:
    """sum over (x, y) of E_q[log p(z | x) p(y | x, z)] + H(q)."""
    total = 0.0
    for (x, y), count in data.items():
        joint = search[x] * answer[x, :, y]
        kept = q[x, y] > 0
        total += count * float((q[x, y][kept] * (joint[kept].log() - q[x, y][kept].log())).sum())
    return total


def exact_posterior(search: torch.Tensor, answer: torch.Tensor, x: int, y: int) -> torch.Tensor:
    """The E-step with every trajectory enumerated as often as the policy would sample it.

    Self-normalised weights of samples from p(z | x) are w(z) = p(y | x, z) / sum; with z enumerated instead of sampled
    its proposal probability enters the score, which is what the log of the joint does.
    """
    logprobs = (search[x] * answer[x, :, y]).log()
    return self_normalized_weights(logprobs, torch.zeros(len(logprobs), dtype=torch.int64))


def test_the_elbo_rises_under_exact_em() -> None:
    """3 questions, 5 trajectories, 4 answers, categorical tables; the M-step is the weighted maximum likelihood."""
    generator = torch.Generator().manual_seed(7)
    search = torch.rand(3, 5, generator=generator, dtype=torch.float64).softmax(dim=-1)
    answer = (2 * torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)).softmax(dim=-1)
    data = {(0, 1): 3, (0, 2): 1, (1, 0): 2, (1, 3): 2, (2, 2): 5}
    values = []
    for _ in range(12):
        q = {pair: exact_posterior(search, answer, *pair) for pair in data}
        before = elbo(q, search, answer, data)
        # With the exact posterior the bound is tight.
        assert before == pytest.approx(expected_log_likelihood(search, answer, data), abs=1e-9)
        search_counts, answer_counts = torch.zeros_like(search), torch.zeros_like(answer)
        for (x, y), count in data.items():
            search_counts[x] += count * q[x, y]
            answer_counts[x, :, y] += count * q[x, y]
        search = search_counts / search_counts.sum(dim=-1, keepdim=True)
        answer = answer_counts / answer_counts.sum(dim=-1, keepdim=True).clamp(min=1e-300)
        after = elbo(q, search, answer, data)
        values += [before, after]
    assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(values))
    assert values[-1] > values[0] + 1.0
    # The best possible: each question's answers at their frequencies.
    best = 3 * math.log(3 / 4) + math.log(1 / 4) + 4 * math.log(1 / 2)
    assert values[-1] <= best + 1e-9


def test_inverted_weights_would_lower_the_elbo() -> None:
    """The check can fail: the weights of the released code's main branch (s / sum s) break it on the same problem."""
    search = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    answer = torch.tensor([[[0.9, 0.1], [0.1, 0.9]]], dtype=torch.float64)
    data = {(0, 0): 1}
    nll = -answer[0, :, 0].log()
    inverted = nll / nll.sum()
    start = expected_log_likelihood(search, answer, data)
    assert expected_log_likelihood(inverted[None], answer, data) < start
    posterior = exact_posterior(search, answer, 0, 0)
    assert expected_log_likelihood(posterior[None], answer, data) > start
