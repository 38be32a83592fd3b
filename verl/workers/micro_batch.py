"""Cut a batch into mini-batches, a rank's share of each, and micro-batches that fit into memory.

FSDP's gathers are collective, so all ranks run the same number of forward and backward passes; a rank that has fewer
micro-batches than another runs empty ones, which contribute nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TypeVar

import torch
from torch import Tensor

from verl.algorithms.balance import balanced_partition, pack_rows
from verl.batch import Batch

B = TypeVar("B", bound=Batch)


def mini_batches(batch: Batch, size: int | None, epochs: int, generator: torch.Generator | None) -> Iterator[list[int]]:
    """Yield the row numbers of one mini-batch after the other.

    Rows without action tokens (failed trajectories) are left out. The rest is cut into as many nearly equal parts as
    `size` asks for, instead of leaving a small, noisy remainder at the end.

    Args:
        size: most rows of a mini-batch; None takes all at once.
        epochs: passes over the batch.
        generator: shuffles the rows anew in each pass; None keeps their order.
    """
    rows = batch.action_mask.any(dim=1).nonzero().squeeze(1)
    if not len(rows):
        return
    count = 1 if size is None else -(-len(rows) // size)
    for _ in range(epochs):
        order = rows if generator is None else rows[torch.randperm(len(rows), generator=generator)]
        for part in order.tensor_split(count):
            yield part.tolist()


def rank_micro_batches(
    lengths: Sequence[int], rows: Sequence[int], rank: int, size: int, budget: int
) -> list[list[int]]:
    """Return the micro-batches of rank `rank` of `size` for the mini-batch `rows`.

    Every rank gets as many, because each computes the plan of all.

    Args:
        lengths: tokens of each row of the batch.
        rows: row numbers of the mini-batch.
        budget: most tokens of a micro-batch, padding included.
    """
    shares = balanced_partition([lengths[row] for row in rows], size)
    plans = [
        [[rows[share[i]] for i in group] for group in pack_rows([lengths[rows[i]] for i in share], budget)]
        for share in shares
    ]
    return padded(plans[rank], max(len(plan) for plan in plans))


def padded(micro_batches: list[list[int]], count: int) -> list[list[int]]:
    """Append empty micro-batches until there are `count`."""
    return micro_batches + [[] for _ in range(count - len(micro_batches))]


def take(batch: B, rows: Sequence[int], device: torch.device) -> B:
    """Return the rows as a batch on `device` without superfluous padding; no rows give one blank row of padding."""
    if rows:
        return _move(batch.select(torch.tensor(rows)).trimmed(), device)
    # Two columns, because a model that predicts the next token needs one before it.
    blank = {name: value.new_zeros((1,) if name == "group_ids" else (1, 2)) for name, value in _tensors(batch).items()}
    return _move(type(batch)(**blank), device)


def _move(batch: B, device: torch.device) -> B:
    return type(batch)(**{name: value.to(device) for name, value in _tensors(batch).items()})


def _tensors(batch: Batch) -> dict[str, Tensor]:
    return {item.name: value for item in fields(batch) if (value := getattr(batch, item.name)) is not None}
