"""Trajectories to tensors, against hand-written rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.agent.fakes import question
from verl.agent.collate import collate, weight_versions
from verl.types import Role, Segment, Stop, Trajectory, Turn

PAD = 99


def policy(*ids: int, version: int = 1) -> Segment:
    """A policy segment; the log-probability of id i is -i/10."""
    return Segment(ids, Role.POLICY, tuple(-i / 10 for i in ids), version)


def environment(*ids: int) -> Segment:
    return Segment(ids, Role.ENVIRONMENT)


def trajectory(id: str, prompt: tuple[int, ...], *segments: Segment, stop: Stop = Stop.FINISHED) -> Trajectory:
    turns = tuple(Turn(segments=(segment,), text="") for segment in segments)
    return Trajectory(question(id=id), prompt, turns, stop)


LONG = trajectory("q/1", (1, 2), policy(3, version=4), environment(4, 5), policy(6, 7, version=5))
SHORT = trajectory("q/2", (8,), policy(9))
FAILED = trajectory("q/1", (1, 2), policy(3), environment(4), stop=Stop.FAILED)


def test_batch_by_hand() -> None:
    batch = collate([LONG, SHORT, FAILED], PAD)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7], [8, 9] + [PAD] * 5, [1, 2, 3, 4] + [PAD] * 3]
    assert batch.attention_mask.int().tolist() == [[1] * 7, [1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0]]
    assert batch.action_mask.int().tolist() == [[0, 0, 1, 0, 0, 1, 1], [0, 1, 0, 0, 0, 0, 0], [0] * 7]
    assert batch.position_ids[0].tolist() == list(range(7))
    assert batch.position_ids[1, :2].tolist() == [0, 1]
    logprobs = torch.tensor([[0, 0, -0.3, 0, 0, -0.6, -0.7], [0, -0.9, 0, 0, 0, 0, 0], [0] * 7])
    torch.testing.assert_close(batch.rollout_logprobs, logprobs, rtol=0, atol=0)
    assert batch.group_ids.tolist() == [0, 1, 0]


def test_weight_versions_by_hand() -> None:
    versions = weight_versions([LONG, SHORT, FAILED])
    assert versions.tolist() == [[-1, -1, 4, -1, -1, 5, 5], [-1, 1] + [-1] * 5, [-1] * 7]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="no trajectories"):
        collate([], PAD)
    torn = trajectory("q/3", (1,), Segment((2, 3), Role.POLICY, (-0.5,), 0))
    with pytest.raises(ValueError, match=r"q/3.*2 ids and 1"):
        collate([torn], PAD)


SEGMENTS = st.lists(
    st.tuples(st.sampled_from(Role), st.lists(st.integers(0, 50), max_size=5)).map(
        lambda drawn: policy(*drawn[1]) if drawn[0] is Role.POLICY else Segment(tuple(drawn[1]), drawn[0])
    ),
    max_size=5,
)


@given(st.lists(st.tuples(st.lists(st.integers(0, 50), min_size=1, max_size=5), SEGMENTS), min_size=1, max_size=5))
def test_every_row_can_be_read_back(drawn: list[tuple[list[int], list[Segment]]]) -> None:
    made = [trajectory(f"q/{i}", tuple(prompt), *segments) for i, (prompt, segments) in enumerate(drawn)]
    batch = collate(made, PAD)
    for row, (prompt, segments) in enumerate(drawn):
        ids = batch.input_ids[row][batch.attention_mask[row]].tolist()
        assert ids == prompt + [token for s in segments for token in s.ids]
        actions = batch.input_ids[row][batch.action_mask[row]].tolist()
        assert actions == [token for s in segments if s.role is Role.POLICY for token in s.ids]
        expected = torch.where(batch.action_mask[row], batch.input_ids[row] / -10, torch.zeros(()))
        torch.testing.assert_close(batch.rollout_logprobs[row], expected)
