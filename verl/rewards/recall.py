"""Rewards that read the documents alone: recall of the gold passages, and whether a gold answer is in the context."""

from __future__ import annotations

from collections.abc import Sequence

from verl.errors import DataError
from verl.rewards.evidence import Evidence, failed
from verl.rewards.text import has_answer, normalise
from verl.types import Document, Question, RewardOutcome


def gold_recall(question: Question, documents: Sequence[Document]) -> float | None:
    """Return the share of the question's distinct gold titles among `documents`; None if it has no gold titles.

    Titles are compared after normalisation; one that normalises to nothing is compared as it stands.
    """
    wanted = {title_key(title) for title in question.gold_titles}
    if not wanted:
        return None
    found = {title_key(document.title) for document in documents}
    return len(wanted & found) / len(wanted)


def answer_in_context(question: Question, documents: Sequence[Document]) -> bool:
    """Whether the tokens of a gold answer stand next to each other in the title or the text of any document.

    This is DPR's retrieval accuracy, which compares texts as they are.
    """
    return any(
        has_answer(document.text, question.answers) or has_answer(document.title, question.answers)
        for document in documents
    )


class RecallOfGold:
    """Reward the recall of the gold passages; part: recall."""

    def validate(self, questions: Sequence[Question]) -> None:
        """Check that every question names its gold passages.

        Raises:
            DataError: some name none.
        """
        missing = [question.id for question in questions if not question.gold_titles]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(questions)} questions have no gold titles, the first is {missing[0]!r}; "
                "expected at least one for each, drop these questions or choose another reward"
            )

    async def __call__(self, evidence: Evidence) -> RewardOutcome:
        recall = gold_recall(evidence.question, evidence.documents)
        if recall is None:
            return failed(f"question {evidence.question.id!r} has no gold titles")
        return RewardOutcome(recall, {"recall": recall})


async def context_holds_answer(evidence: Evidence) -> RewardOutcome:
    """Reward 1 if a gold answer stands in the documents."""
    value = float(answer_in_context(evidence.question, evidence.documents))
    return RewardOutcome(value, {"answer_in_context": value})


def title_key(title: str) -> str:
    """Return what two spellings of a title have in common."""
    return normalise(title) or title.strip().lower()
