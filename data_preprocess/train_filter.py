"""Which questions the published training sets leave out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from verl.types import Question

_BARE_WORDS = frozenset({"yes", "no", "true", "false"})


@dataclass(frozen=True)
class TrainFilter:
    """Which questions a training set leaves out; not applied to other splits.

    The defaults are the published rules (specification: s3's train_s3.py).

    Attributes:
        drop_bare_golds: those with a gold that is a bare yes, no, true or false.
        drop_rag_correct: those that naive RAG answers accurately.
    """

    drop_bare_golds: bool = True
    drop_rag_correct: bool = True

    @classmethod
    def none(cls) -> TrainFilter:
        """Return the filter that leaves nothing out."""
        return cls(drop_bare_golds=False, drop_rag_correct=False)

    def reason(self, question: Question) -> str:
        """Return why `question` is left out; empty when it is kept."""
        if self.drop_bare_golds and any(answer.strip().lower() in _BARE_WORDS for answer in question.answers):
            return "bare gold"
        if self.drop_rag_correct and question.baseline is not None and question.baseline.correct:
            return "naive RAG correct"
        return ""


def select(questions: Iterable[Question], keep: TrainFilter) -> tuple[list[Question], dict[str, int]]:
    """Return the questions that the filter keeps, and how many it leaves out for which reason."""
    kept: list[Question] = []
    dropped: dict[str, int] = {}
    for question in questions:
        reason = keep.reason(question)
        if reason:
            dropped[reason] = dropped.get(reason, 0) + 1
        else:
            kept.append(question)
    return kept, dropped
