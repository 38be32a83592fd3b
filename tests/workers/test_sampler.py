"""Token sampling against a plain-Python account of temperature, top-k and top-p."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verl.agent.protocols import Sampling
from verl.workers.sampler import RowSampling, processed_logprobs, sample

CPU = torch.device("cpu")


def rows(*samplings: Sampling, seeds: list[int] | None = None) -> RowSampling:
    return RowSampling.of(samplings, seeds or list(range(len(samplings))), CPU)


def reference(logits: list[float], sampling: Sampling) -> list[float]:
    """Sort, keep the k best, keep the smallest head that reaches top_p, renormalise."""
    temperature = sampling.temperature or 1.0
    order = sorted(range(len(logits)), key=lambda v: -logits[v])
    if sampling.temperature > 0 and sampling.top_k > 0:
        order = order[: sampling.top_k]
    weight = {v: math.exp((logits[v] - logits[order[0]]) / temperature) for v in order}
    total, reached, kept = sum(weight.values()), 0.0, []
    for v in order:
        if sampling.temperature > 0 and sampling.top_p < 1 and reached >= sampling.top_p * total:
            break
        kept.append(v)
        reached += weight[v]
    return [math.log(weight[v] / reached) if v in kept else -math.inf for v in range(len(logits))]


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 0.6, 1.0, 2.0]),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    top_k=st.sampled_from([-1, 1, 2, 3, 100]),
)
LOGITS = st.lists(st.integers(-40, 40).map(lambda n: n / 8 + 0.01), min_size=6, max_size=6, unique=True)


@given(st.lists(st.tuples(LOGITS, SAMPLINGS), min_size=1, max_size=4))
def test_processed_logprobs(drawn: list[tuple[list[float], Sampling]]) -> None:
    logits = torch.tensor([logits for logits, _ in drawn])
    got = processed_logprobs(logits, rows(*(sampling for _, sampling in drawn)))
    expected = torch.tensor([reference(*row) for row in drawn])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_truncation_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = processed_logprobs(logits, rows(Sampling(top_p=0.7))).exp()
    torch.testing.assert_close(kept, torch.tensor([[0.625, 0.375, 0.0, 0.0]]))
    kept = processed_logprobs(logits, rows(Sampling(top_p=0.7, top_k=1))).exp()
    torch.testing.assert_close(kept, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))


def test_greedy_takes_the_best_with_its_plain_logprob() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 0.0]], dtype=torch.bfloat16)
    ids, logprobs = sample(logits, rows(Sampling(temperature=0.0, top_p=0.1, top_k=1), Sampling(temperature=0.0)))
    assert ids.tolist() == [1, 0]
    torch.testing.assert_close(logprobs, logits.float().log_softmax(-1).amax(-1))


def test_draws_follow_the_distribution() -> None:
    """2,000 draws; five standard deviations of a binomial share are allowed."""
    count = 2000
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).repeat(count, 1)
    sampling = Sampling(temperature=0.7, top_k=3)
    ids, logprobs = sample(logits, rows(*[sampling] * count))
    expected = processed_logprobs(logits[:1], rows(sampling))[0].exp()
    for token, probability in enumerate(expected.tolist()):
        share = (ids == token).float().mean().item()
        assert abs(share - probability) <= 5 * math.sqrt(probability * (1 - probability) / count)
    torch.testing.assert_close(logprobs, expected.log()[ids])


@pytest.mark.parametrize("seed", range(5))
def test_a_row_draws_the_same_alone_and_in_a_batch(seed: int) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(seed))
    samplings = [Sampling(temperature=1.0), Sampling(temperature=0.0), Sampling(temperature=2.0, top_p=0.9)]
    together, _ = sample(logits, rows(*samplings, seeds=[7, 8, seed]))
    alone, _ = sample(logits[2:], rows(samplings[2], seeds=[seed]))
    assert together[2] == alone[0]
    chosen = rows(*samplings, seeds=[7, 8, seed]).select([2, 0])
    assert sample(logits[[2, 0]], chosen)[0].tolist() == together[[2, 0]].tolist()
