"""What a reward may look at: a trajectory, the documents it found, and the frozen generator's answer from them.

Whatever else a reward asks for (`Tools`) is handed in as a callable; nothing here knows how it is served.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from verl.errors import ConfigError, GeneratorError
from verl.rewards.text import span_match
from verl.types import Document, Question, RewardOutcome, SqlResult, Trajectory

logger = logging.getLogger(__name__)

Judging = Literal["when_needed", "always"]
"""When the judge is asked: only where the span match says no, or also where it says yes, to see whether they agree."""


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


class Likelihood(Protocol):
    """How likely the frozen generator finds a given answer; bounds its own concurrency."""

    async def __call__(self, question: Question, documents: Sequence[Document], answer: str) -> tuple[float, ...]:
        """Return the log-probability of each token of `answer`, given the question and `documents`.

        Raises:
            GeneratorError: after bounded retries.
        """
        ...


class Sample(Protocol):
    """One answer that the frozen generator sampled."""

    @property
    def text(self) -> str:
        """The answer."""
        ...

    @property
    def logprobs(self) -> tuple[float, ...]:
        """Log-probability of each of its tokens."""
        ...


class Sampler(Protocol):
    """The frozen generator, sampled; bounds its own concurrency."""

    async def __call__(self, question: Question, documents: Sequence[Document], n: int) -> tuple[Sample, ...]:
        """Return `n` independent answers from `documents`, which may be empty.

        Raises:
            GeneratorError: after bounded retries.
        """
        ...


class Entailment(Protocol):
    """A model of natural language inference."""

    async def __call__(self, pairs: Sequence[tuple[str, str]]) -> Sequence[float]:
        """Return for each pair the probability, in [0, 1], that its first text entails its second."""
        ...


class Sql(Protocol):
    """The databases of a data set; bounds its own concurrency and what a statement may take."""

    async def __call__(self, question: Question, sql: str, keep: bool = False) -> SqlResult:
        """Run one statement in the database of `question`; whatever comes of it is a result.

        Args:
            keep: the result may be kept, and given again for the same statement: for golds.

        Raises:
            RetrieverError: nothing can be run at all.
        """
        ...


@dataclass(frozen=True, slots=True)
class Tools:
    """What some rewards ask besides the generator's answer; None where it is not to be had.

    A reward names what it asks in a class attribute `needs`, for example `needs = ("likelihood",)`.
    """

    likelihood: Likelihood | None = None
    sampler: Sampler | None = None
    entailment: Entailment | None = None
    sql: Sql | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """An answer and whether it is accurate.

    Attributes:
        correct: span match, else the judge's yes.
        judged: the judge's verdict; None when it was not asked, abstained or failed.
        documents_used: documents in the generator's prompt.
        judge_asked: whether a judge was asked.
        judge_failed: it could not answer, where the span match had settled the question already.
    """

    answer: str
    correct: bool
    span: bool
    judged: bool | None
    documents_used: int
    judge_asked: bool = False
    judge_failed: bool = False

    def judge_parts(self, judging: Judging) -> Mapping[str, float]:
        """Return what the judge did as parts of an outcome; their means over outcomes are rates.

        `judged_yes`, `judged_no`, `judge_abstained`, `judge_failed`: of all times that it was asked. If it is always
        asked, and gave a verdict: `judge_agrees_with_span`, and `judge_agreement`, its rate of yes where the span match
        says yes. (Asked about misses alone it could only agree by saying no.)
        """
        if not self.judge_asked:
            return {}
        parts = {
            "judged_yes": float(self.judged is True),
            "judged_no": float(self.judged is False),
            "judge_abstained": float(self.judged is None and not self.judge_failed),
            "judge_failed": float(self.judge_failed),
        }
        if self.judged is None or judging != "always":
            return parts
        parts["judge_agrees_with_span"] = float(self.judged == self.span)
        return parts | ({"judge_agreement": float(self.judged)} if self.span else {})


async def judge_answer(
    question: Question, answered: Answered, judge: Judge | None = None, judging: Judging = "when_needed"
) -> Verdict:
    """Decide accuracy as s3 does (generation accuracy): 1 on a span match, else what the judge says, if there is one.

    Asked where the span match says yes, the judge changes nothing: its verdict is only recorded, and so is its failure.

    Raises:
        GeneratorError: the judge was needed and could not be asked.
    """
    answer = answered.answer
    span = span_match(answer, question.answers)
    if judge is None or not answer.strip() or (span and judging == "when_needed"):
        return Verdict(answer, span, span, None, answered.documents_used)
    try:
        judged = await judge(question, answer)
    except GeneratorError as error:
        if not span:
            raise
        logger.warning("question %r: the judge could not be asked about a span match: %s", question.id, error)
        return Verdict(answer, True, True, None, answered.documents_used, judge_asked=True, judge_failed=True)
    return Verdict(answer, span or judged is True, span, judged, answered.documents_used, judge_asked=True)


class Evidence:
    """One trajectory under judgement. The generator is asked at most once, however many rewards want its answer.

    Args:
        documents: what the generator gets of the trajectory's documents.
        tools: what rewards may ask besides.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        documents: Sequence[Document],
        answer: Answer,
        judge: Judge | None = None,
        judging: Judging = "when_needed",
        tools: Tools | None = None,
    ) -> None:
        self.trajectory = trajectory
        self.question = trajectory.question
        self.documents = tuple(documents)
        self._answer = answer
        self._judge = judge
        self._judging = judging
        self._tools = tools or Tools()
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

    @property
    def likelihood(self) -> Likelihood:
        """Scores a given answer; ConfigError where there is none."""
        if self._tools.likelihood is None:
            raise missing_tool("likelihood")
        return self._tools.likelihood

    @property
    def sampler(self) -> Sampler:
        """Samples answers; ConfigError where there is none."""
        if self._tools.sampler is None:
            raise missing_tool("sampler")
        return self._tools.sampler

    @property
    def entailment(self) -> Entailment:
        """Tells whether one text entails another; ConfigError where there is none."""
        if self._tools.entailment is None:
            raise missing_tool("entailment")
        return self._tools.entailment

    @property
    def sql(self) -> Sql:
        """Runs SQL; ConfigError where there is none."""
        if self._tools.sql is None:
            raise missing_tool("sql")
        return self._tools.sql

    async def _ask(self) -> Verdict:
        answered = await self._answer(self.question, self.documents)
        return await judge_answer(self.question, answered, self._judge, self._judging)


_HOW_TO_GET = {
    "likelihood": "pass Tools(likelihood=...), a generator that returns the log-probabilities of a given answer",
    "sampler": "pass Tools(sampler=...), a generator that returns sampled answers with their log-probabilities",
    "entailment": "set the reward's entailment.model to an NLI cross-encoder, for example "
    "microsoft/deberta-base-mnli, or its entailment.kind=same_normalised",
    "sql": "set the reward's sql.databases to the folder of the databases",
}


def missing_tool(name: str, reward: str = "this reward") -> ConfigError:
    """Return the error that says how to get the tool `name`, a field of `Tools`."""
    how = _HOW_TO_GET.get(name)
    if how is None:
        return ConfigError(f"{reward} needs {name!r}, which is no tool; expected one of {', '.join(_HOW_TO_GET)}")
    return ConfigError(f"{reward} needs {name}, and there is none; {how}")


def failed(cause: str) -> RewardOutcome:
    """Return the outcome of what could not be scored; its score is NaN, so that no statistic can swallow it."""
    return RewardOutcome(score=math.nan, failed=cause)
