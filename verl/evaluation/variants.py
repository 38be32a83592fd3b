"""The same contexts, cut or put together differently: the first k documents, and s3's ablations.

The ablations are made from the trace of an s3 trajectory, without searching again: `no_selection` gives the generator
all documents that the searcher was shown instead of those that it selected, `no_round_0` leaves out the round-0
documents, `neither` does both. They are published as context_no_select, context_no_init and context_no_both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from verl.agent.grammar.text import unique_documents
from verl.errors import DataError
from verl.types import Document, Trajectory

Ablation = Literal["no_selection", "no_round_0", "neither"]


def ablated(trajectory: Trajectory, ablation: Ablation) -> tuple[Document, ...]:
    """Return the documents of one ablation.

    Raises:
        DataError: no turn of the trajectory selected or searched, and it has no round-0 documents: not an s3 trace.
    """
    if not trajectory.turns:
        raise DataError(
            f"question {trajectory.question.id!r} has no trace of turns; ablations need contexts of an s3 searcher"
        )
    return _ABLATIONS[ablation](trajectory)


def cut(documents: Sequence[Document], topk: int | None) -> tuple[Document, ...]:
    """Return the first `topk` documents, whole; all of them if None."""
    return tuple(documents[:topk])


def with_documents(trajectory: Trajectory, documents: Sequence[Document]) -> Trajectory:
    """Return the trajectory as if it had gathered these documents."""
    return replace(trajectory, documents=tuple(documents))


def _shown(trajectory: Trajectory) -> list[Document]:
    """All documents of the blocks after round 0, in order."""
    return [document for turn in trajectory.turns if turn.result for document in turn.result.documents]


def _selected(trajectory: Trajectory) -> list[Document]:
    """What was selected from the blocks after round 0, and those blocks that nothing was selected from, in order."""
    blocks: list[tuple[Document, ...]] = [()]
    chosen: dict[int, list[Document]] = {}
    for turn in trajectory.turns:
        block = len(blocks) - 1
        if turn.selected is not None and block and block not in chosen:
            chosen[block] = [blocks[block][number - 1] for number in sorted(turn.selected)]
        if turn.result is not None:
            blocks.append(turn.result.documents)
    picked = [document for block in sorted(chosen) for document in chosen[block]]
    return picked + [doc for block, docs in enumerate(blocks) if block and block not in chosen for doc in docs]


_ABLATIONS: dict[str, Callable[[Trajectory], tuple[Document, ...]]] = {
    "no_selection": lambda t: unique_documents([*t.question.initial_documents, *_shown(t)]),
    "no_round_0": lambda t: unique_documents(_selected(t)),
    "neither": lambda t: unique_documents(_shown(t)),
}
