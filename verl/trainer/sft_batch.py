"""From examples to the batches of optimizer steps: their order, and how they are laid into rows.

Legend: B rows, S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from verl.algorithms.packing import first_fit_decreasing
from verl.algorithms.weighted_nll import Reduction, token_coefficients
from verl.batch import WeightedBatch
from verl.trainer.sft_data import SftExample


def step_examples(count: int, size: int, step: int, seed: int, shuffle: bool = True) -> list[int]:
    """Return the numbers of the examples of training step `step` (1 is the first).

    A function of the step alone, so a resumed run needs no memory of the order. Each epoch visits every example once,
    in an order of its own; its last batch may be smaller.

    Args:
        count: number of examples.
        size: most examples of one step.
    """
    steps = steps_per_epoch(count, size)
    epoch, within = divmod(step - 1, steps)
    first = within * size
    if not shuffle:
        return list(range(first, min(count, first + size)))
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(count, generator=generator)[first : first + size].tolist()


def steps_per_epoch(count: int, size: int) -> int:
    """Return how many steps visit every example once."""
    return -(-count // size)


def rows_of(lengths: Sequence[int], row_tokens: int, ranks: int, packing: bool) -> list[list[int]]:
    """Return the examples of each row: alone, or packed into rows of at most `row_tokens`.

    Rows stay short enough that every rank gets one.
    """
    if not packing:
        return [[index] for index in range(len(lengths))]
    share = -(-sum(lengths) // ranks)
    return first_fit_decreasing(lengths, max(1, min(row_tokens, max(share, max(lengths, default=1)))))


def collate(
    examples: Sequence[SftExample],
    rows: Sequence[Sequence[int]],
    reduction: Reduction,
    micro_batch: int | None = None,
    pad_id: int = 0,
) -> WeightedBatch:
    """Lay one step's examples into rows, with what each token counts in the loss.

    Args:
        rows: example numbers of each row, every example once.
        micro_batch: see `verl.algorithms.weighted_nll.token_coefficients`.
    """
    counts = [sum(example.learned) for example in examples]
    weights = token_coefficients(reduction, [example.weight for example in examples], counts, micro_batch)
    lengths = [sum(len(examples[i].input_ids) for i in row) for row in rows]
    shape = (len(rows), max(lengths, default=0))
    ids = torch.full(shape, pad_id, dtype=torch.int64)
    learned = torch.zeros(shape, dtype=torch.bool)
    positions = torch.zeros(shape, dtype=torch.int64)
    token_weights = torch.zeros(shape, dtype=torch.float32)
    for number, row in enumerate(rows):
        start = 0
        for index in row:
            example, place = examples[index], slice(start, start + len(examples[index].input_ids))
            ids[number, place] = torch.tensor(example.input_ids, dtype=torch.int64)
            learned[number, place] = torch.tensor(example.learned, dtype=torch.bool)
            positions[number, place] = torch.arange(len(example.input_ids))
            token_weights[number, place] = learned[number, place] * weights[index]
            start = place.stop
    return WeightedBatch(
        input_ids=ids,
        attention_mask=torch.arange(shape[1]) < torch.tensor(lengths)[:, None],
        action_mask=learned,
        position_ids=positions,
        rollout_logprobs=torch.zeros(shape, dtype=torch.float32),
        group_ids=torch.arange(len(rows)),
        token_weights=token_weights,
    )
