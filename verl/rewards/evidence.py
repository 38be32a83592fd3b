"""What a reward may look at: a trajectory, the documents it found, and the frozen generator's answer from them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from verl.rewards.text import span_match
from verl.types import Document, Question, RewardOutcome, Trajectory


class Answered(Protocol):
    """What the frozen generator made of a context."""

    @property
    def answer(self) -> str:
        """The final answer, without quoted evidence."""
        ...

    @property
    def documents_used(self) -> int:
        """How many of the given documents fitted into its prompt."""
        ...


class Answer(Protocol):
    """The frozen generator as a callable; bounds its own concurrency."""

    async def __call__(self, question: Question, documents: Sequence[Document]) -> Answered:
        """Answer from `documents`.

        Raises:
            GeneratorError: after bounded retries; never an empty or made-up answer instead.
        """
        ...


class Judge(Protocol):
    """A second opinion where the span match says no."""

    async def __call__(self, question: Question, answer: str) -> bool | None:
        """Say whether `answer` is right; None is an abstention, which is never paid.

        Raises:
            GeneratorError: after bounded retries.
        """
        ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """An answer and whether it is accurate.

    Attributes:
        correct: span match, else the judge's yes.
        judged: the judge's verdict; None when it was not asked or abstained.
        documents_used: documents in the generator's prompt.
    """

    answer: str
    correct: bool
    span: bool
    judged: bool | None
    documents_used: int


async def judge_answer(question: Question, answered: Answered, judge: Judge | None = None) -> Verdict:
    """Decide accuracy as s3 does (generation accuracy): 1 on a span match, else what the judge says, if there is one.

    Raises:
        GeneratorError: the judge could not be asked.
    """
    answer = answered.answer
    span = span_match(answer, question.answers)
    judged = None
    if not span and judge is not None and answer.strip():
        judged = await judge(question, answer)
    return Verdict(answer, span or judged is True, span, judged, answered.documents_used)


class Evidence:
    """One trajectory under judgement. The generator is asked at most once, however many rewards want its answer."""

    def __init__(
        self, trajectory: Trajectory, documents: Sequence[Document], answer: Answer, judge: Judge | None = None
    ) -> None:
        self.trajectory = trajectory
        self.question = trajectory.question
        self.documents = tuple(documents)
        self._answer = answer
        self._judge = judge
        self._pending: asyncio.Task[Verdict] | None = None

    async def verdict(self) -> Verdict:
        """Return the generator's answer from `documents` with its accuracy.

        Raises:
            GeneratorError: the generator or the judge could not answer.
        """
        if self._pending is None:
            self._pending = asyncio.create_task(self._ask())
        return await self._pending

    @property
    def asked(self) -> bool:
        """Whether the generator has answered."""
        return self._pending is not None and self._pending.done()

    async def _ask(self) -> Verdict:
        answered = await self._answer(self.question, self.documents)
        return await judge_answer(self.question, answered, self._judge)


def failed(cause: str) -> RewardOutcome:
    """Return the outcome of what could not be scored; its score is NaN, so that no statistic can swallow it."""
    return RewardOutcome(score=math.nan, failed=cause)
