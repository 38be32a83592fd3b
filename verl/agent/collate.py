"""Trajectories to tensors: the only place that builds them.

Legend: B trajectories, S tokens of the longest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verl.batch import Batch
from verl.types import Role, Stop, Trajectory


@dataclass(frozen=True, slots=True)
class _Row:
    """One trajectory, flat; everything is aligned with `ids`."""

    ids: list[int]
    action: list[bool]
    logprobs: list[float]
    versions: list[int]


def collate(trajectories: Sequence[Trajectory], pad_id: int) -> Batch:
    """Build the right-padded batch of a step, one row per trajectory, in order.

    `action_mask` is True exactly on the tokens that the policy sampled. A failed trajectory keeps its row, so that
    rows stay aligned with scores, but has no action tokens: it cannot reach a loss. Group statistics know nothing of
    masks, so the caller leaves failed trajectories out before computing them.

    Args:
        pad_id: fills `input_ids` behind the end of each sequence.

    Raises:
        ValueError: no trajectories, a policy segment whose log-probabilities do not match its ids, or a trajectory
            whose conversation was rebuilt.
    """
    rows = [_flatten(trajectory) for trajectory in _not_empty(trajectories)]
    attention_mask = _pad([[True] * len(row.ids) for row in rows], False, torch.bool)
    groups = {question_id: n for n, question_id in enumerate(dict.fromkeys(t.question.id for t in trajectories))}
    return Batch(
        input_ids=_pad([row.ids for row in rows], pad_id, torch.int64),
        attention_mask=attention_mask,
        action_mask=_pad([row.action for row in rows], False, torch.bool),
        position_ids=(attention_mask.cumsum(dim=1) - 1).clamp(min=0),
        rollout_logprobs=_pad([row.logprobs for row in rows], 0.0, torch.float32),
        group_ids=torch.tensor([groups[t.question.id] for t in trajectories], dtype=torch.int64),
    )


def weight_versions(trajectories: Sequence[Trajectory]) -> Tensor:
    """Return (B, S) int64, aligned with `collate`: the weights' version that sampled each action token, else -1.

    Raises:
        ValueError: as `collate`.
    """
    return _pad([_flatten(trajectory).versions for trajectory in _not_empty(trajectories)], -1, torch.int64)


def _not_empty(trajectories: Sequence[Trajectory]) -> Sequence[Trajectory]:
    if not trajectories:
        raise ValueError("got no trajectories; expected at least one")
    return trajectories


def _flatten(trajectory: Trajectory) -> _Row:
    prompt = len(trajectory.prompt_ids)
    row = _Row(list(trajectory.prompt_ids), [False] * prompt, [0.0] * prompt, [-1] * prompt)
    if any(turn.prompt_ids for turn in trajectory.turns):
        raise ValueError(
            f"question {trajectory.question.id}: its conversation was rebuilt between turns, so there is no one "
            "sequence of tokens to train on; train with a protocol whose context only grows"
        )
    for segment in trajectory.segments:
        count = len(segment.ids)
        acted = segment.role is Role.POLICY and trajectory.stop is not Stop.FAILED
        if segment.role is Role.POLICY and len(segment.logprobs) != count:
            raise ValueError(
                f"question {trajectory.question.id}: a policy segment has {count} ids and {len(segment.logprobs)} "
                "log-probabilities; expected one each, from the engine that sampled it"
            )
        row.ids.extend(segment.ids)
        row.action.extend([acted] * count)
        row.logprobs.extend(segment.logprobs if acted else [0.0] * count)
        row.versions.extend([segment.weight_version if acted else -1] * count)
    return row


def _pad(rows: Sequence[Sequence[bool | int | float]], fill: bool | int | float, dtype: torch.dtype) -> Tensor:
    """Right-pad to the longest row: (B, S)."""
    padded = torch.full((len(rows), max(map(len, rows))), fill, dtype=dtype)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = torch.tensor(values, dtype=dtype)
    return padded
