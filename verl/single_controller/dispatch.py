"""Split a batch over workers by token count, and put the answers back in the order of its rows.

Legend: B sequences, S tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from verl.algorithms.balance import balanced_partition
from verl.batch import Batch

B = TypeVar("B", bound=Batch)


@dataclass(frozen=True)
class Split:
    """How the rows of a batch went to the workers.

    Attributes:
        rows: for each worker, its row numbers.
        width: columns of the batch.
    """

    rows: tuple[tuple[int, ...], ...]
    width: int

    def merge(self, answers: Sequence[Any]) -> Any:
        """Put the workers' answers together.

        - Tensors (rows, ...) are concatenated and brought back into the order of the batch; narrower ones are padded
          with zeros to the batch's width.
        - Numbers are averaged, weighted by the workers' numbers of rows; workers without rows do not count.
        - Mappings are merged key by key, except that numbers under a key ending in `_sum` or `_count` are added.

        Raises:
            ValueError: the answers differ in kind or keys, or a tensor does not have one row per row of its worker.
            TypeError: they are of a kind that none of the rules covers.
        """
        if all(isinstance(answer, Tensor) for answer in answers):
            return self._merge_rows(answers)
        if all(isinstance(answer, Mapping) for answer in answers):
            return self._merge_mappings(answers)
        if all(isinstance(answer, int | float) for answer in answers):
            return self._mean(answers)
        kinds = sorted({type(answer).__name__ for answer in answers})
        raise TypeError(f"workers answered {', '.join(kinds)}; expected all tensors, all mappings or all numbers")

    def _merge_rows(self, answers: Sequence[Tensor]) -> Tensor:
        for rank, (answer, rows) in enumerate(zip(answers, self.rows, strict=True)):
            if answer.ndim == 0 or len(answer) != len(rows):
                raise ValueError(
                    f"worker {rank} answered a tensor {tuple(answer.shape)} for {len(rows)} rows; expected one row each"
                )
        tail = max((tuple(answer.shape[1:]) for answer in answers), key=len)
        shape = (self.width, *tail[1:]) if tail else ()
        merged = answers[0].new_zeros(sum(map(len, self.rows)), *shape)
        for answer, rows in zip(answers, self.rows, strict=True):
            index = torch.tensor(rows, dtype=torch.int64)
            if tail:
                merged[index, : answer.shape[1]] = answer
            else:
                merged[index] = answer
        return merged

    def _merge_mappings(self, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if len({frozenset(answer) for answer in answers}) > 1:
            raise ValueError(f"workers answered different keys: {[sorted(answer) for answer in answers]}")
        merged = {}
        for key in answers[0]:
            values = [answer[key] for answer in answers]
            adds = key.endswith(("_sum", "_count")) and all(isinstance(value, int | float) for value in values)
            merged[key] = sum(values) if adds else self.merge(values)
        return merged

    def _mean(self, answers: Sequence[float]) -> float:
        weights = [len(rows) for rows in self.rows]
        return sum(w * value for w, value in zip(weights, answers, strict=True) if w) / max(1, sum(weights))


def split(batch: B, workers: int) -> tuple[list[B], Split]:
    """Divide `batch` into one part per worker with nearly equal numbers of tokens, each trimmed to its longest row."""
    partition = balanced_partition(batch.lengths.tolist(), workers)
    parts = [batch.select(torch.tensor(rows, dtype=torch.int64)).trimmed() for rows in partition]
    return parts, Split(tuple(map(tuple, partition)), batch.input_ids.shape[1])
