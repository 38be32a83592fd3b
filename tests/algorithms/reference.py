"""The algorithms once more in plain Python, one number at a time, and random inputs to compare on.

Nothing here is vectorised or shared with `verl/algorithms`; a token is an (advantage, ratio, ...) of floats.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

Rows = list[list[float]]


@dataclass(frozen=True)
class Case:
    """Random (B, S) tensors in float64, a (B, S) mask that may be empty anywhere, and B group ids."""

    mask: Tensor
    group_ids: Tensor
    seed: int

    def normal(self, stream: int, scale: float = 1.0) -> Tensor:
        """(B, S) normal numbers, different for each stream."""
        generator = torch.Generator().manual_seed(self.seed * 97 + stream)
        return torch.randn(self.mask.shape, generator=generator, dtype=torch.float64) * scale

    def scores(self) -> Tensor:
        """(B,) scores."""
        return self.normal(1000)[:, 0]


@st.composite
def cases(draw: st.DrawFn, max_rows: int = 5, max_tokens: int = 8) -> Case:
    """Draw a Case."""
    rows, tokens = draw(st.integers(1, max_rows)), draw(st.integers(1, max_tokens))
    line = st.lists(st.booleans(), min_size=tokens, max_size=tokens)
    mask = draw(st.lists(line, min_size=rows, max_size=rows))
    group_ids = draw(st.lists(st.integers(-2, 2), min_size=rows, max_size=rows))
    return Case(torch.tensor(mask), torch.tensor(group_ids), draw(st.integers(0, 2**20)))


def picked(x: Tensor, mask: Tensor) -> Rows:
    """For each sequence, the masked numbers in order."""
    return [
        [value for value, on in zip(row, flags, strict=True) if on]
        for row, flags in zip(x.tolist(), mask.tolist(), strict=True)
    ]


def placed(rows: Rows, mask: Tensor) -> Tensor:
    """Invert `picked`: (B, S) float64, 0 outside the mask."""
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for b, row in enumerate(rows):
        positions = [s for s, on in enumerate(mask[b].tolist()) if on]
        for s, value in zip(positions, row, strict=True):
            out[b, s] = value
    return out


def whitened(rows: Rows) -> Rows:
    """Subtract the mean and divide by the sample deviation of all numbers."""
    numbers = [value for row in rows for value in row]
    if not numbers:
        return rows
    mean = statistics.fmean(numbers)
    variance = statistics.variance(numbers) if len(numbers) > 1 else 0.0
    return [[(value - mean) / math.sqrt(variance + 1e-8) for value in row] for row in rows]


def gae_row(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """GAE as the explicit double sum over the actions of one sequence."""
    following = [*values, 0.0][1:]
    deltas = [r + gamma * after - now for r, now, after in zip(rewards, values, following, strict=True)]
    return [
        sum((gamma * lam) ** (later - t) * deltas[later] for later in range(t, len(deltas))) for t in range(len(deltas))
    ]


def groups_of(case: Case) -> dict[int, list[int]]:
    """Group id -> the sequences of the group that have an action."""
    groups: dict[int, list[int]] = {}
    for b, group in enumerate(case.group_ids.tolist()):
        if any(case.mask[b].tolist()):
            groups.setdefault(group, []).append(b)
    return groups


def over_groups(case: Case, advantage: Callable[[float, list[float]], float]) -> Tensor:
    """(B, S): `advantage(score, scores of the others)` of each sequence, on its action tokens."""
    scores = case.scores().tolist()
    rows: Rows = [[] for _ in scores]
    for members in groups_of(case).values():
        for b in members:
            others = [scores[other] for other in members if other != b]
            rows[b] = [advantage(scores[b], others)] * int(case.mask[b].sum())
    return placed(rows, case.mask)


def aggregated(rows: Rows, aggregation: str) -> float:
    """Reduce per-token numbers; sequences without tokens do not exist."""
    rows = [row for row in rows if row]
    if not rows:
        return 0.0
    if aggregation == "token_mean":
        return statistics.fmean([value for row in rows for value in row])
    if aggregation == "seq_mean_token_sum":
        return statistics.fmean([sum(row) for row in rows])
    return statistics.fmean([statistics.fmean(row) for row in rows])


def ppo_token(ratio: float, advantage: float, low: float, high: float, dual: float | None) -> float:
    """The PPO loss of one token, by cases instead of by max and min."""
    if advantage >= 0:
        return -min(ratio, 1 + high) * advantage
    loss = -max(ratio, 1 - low) * advantage
    return loss if dual is None else min(loss, -dual * advantage)
