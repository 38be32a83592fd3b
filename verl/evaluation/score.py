"""Scores contexts: what the frozen generator answers from each question's documents, and how good that is.

Denominators. Every mean is over all questions that were asked: one whose generator or judge failed counts as not
accurate, so a failure can never raise a figure, and it is listed with its cause so that it cannot lower one unseen.
Recall is over the questions that name gold passages; recall and answer-in-context do not need the generator.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from verl.errors import DataError, GeneratorError
from verl.rewards.evidence import Answer, Judge, judge_answer
from verl.rewards.recall import answer_in_context, gold_recall
from verl.rewards.text import exact_match, f1
from verl.types import Document, Question

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ScoringConfig:
    """How scores are summarised.

    Attributes:
        resamples: bootstrap resamples behind each interval.
        seed: of the bootstrap.
        max_failed_fraction: a larger share of failed questions is an error, because the figures would mean little.
    """

    resamples: int = 2000
    seed: int = 0
    max_failed_fraction: float = 0.05

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise ValueError(f"resamples={self.resamples}; expected at least 1")
        if not 0 <= self.max_failed_fraction <= 1:
            raise ValueError(f"max_failed_fraction={self.max_failed_fraction}; expected a number from 0 to 1")


@dataclass(frozen=True, slots=True)
class ScoredQuestion:
    """One question's row.

    Attributes:
        recall: share of the gold passages among the documents, None if the question names none.
        documents: number of documents given; `documents_used` of them fitted into the generator's prompt.
        accurate: span match, else the judge's yes (generation accuracy).
        failed: the cause if the generator or the judge could not be asked, else empty.
    """

    id: str
    source: str
    kind: str
    recall: float | None
    answer_in_context: bool
    documents: int
    documents_used: int = 0
    answer: str = ""
    accurate: bool = False
    span: bool = False
    em: bool = False
    f1: float = 0.0
    failed: str = ""


@dataclass(frozen=True, slots=True)
class Summary:
    """Means over `n` questions, all in [0, 1] but for `documents`.

    Attributes:
        failed: questions without an answer; they are among the `n` and count as not accurate.
        accuracy_low, accuracy_high: 95 % percentile bootstrap interval of `accuracy`.
        recall: over the questions that name gold passages, None if none does.
        documents: mean number of documents given.
    """

    n: int
    failed: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    span: float
    em: float
    f1: float
    recall: float | None
    answer_in_context: float
    documents: float


@dataclass(frozen=True, slots=True)
class ScoreReport:
    """All rows, in the order of the questions, and their summaries."""

    rows: tuple[ScoredQuestion, ...]
    overall: Summary
    by_source: Mapping[str, Summary] = field(default_factory=dict)
    by_kind: Mapping[str, Summary] = field(default_factory=dict)

    @property
    def failures(self) -> Mapping[str, str]:
        """Cause of each question that could not be scored, by its id."""
        return {row.id: row.failed for row in self.rows if row.failed}


async def score_contexts(
    questions: Sequence[Question],
    documents: Mapping[str, Sequence[Document]],
    answer: Answer,
    judge: Judge | None = None,
    config: ScoringConfig | None = None,
    progress: Progress | None = None,
) -> ScoreReport:
    """Answer every question from its documents and score the answers, all at once; `answer` bounds the concurrency.

    Args:
        documents: by question id, one entry for every question; it may be empty.
        progress: called with (done, total) after every question.

    Raises:
        DataError: no questions, a repeated id, or a question without an entry in `documents`.
        GeneratorError: more questions failed than `config.max_failed_fraction` allows.
    """
    _check(questions, documents)
    settings = config or ScoringConfig()
    done = 0

    async def score(question: Question) -> ScoredQuestion:
        nonlocal done
        row = await score_question(question, documents[question.id], answer, judge)
        done += 1
        if progress is not None:
            progress(done, len(questions))
        return row

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(score(question)) for question in questions]
    rows = [task.result() for task in tasks]
    _check_failures(rows, settings.max_failed_fraction)
    return summarise(rows, settings)


async def score_question(
    question: Question, documents: Sequence[Document], answer: Answer, judge: Judge | None = None
) -> ScoredQuestion:
    """Score one question; a failure of the generator or the judge becomes a row that says so."""
    row = ScoredQuestion(
        id=question.id,
        source=question.source,
        kind=question.kind,
        recall=gold_recall(question, documents),
        answer_in_context=answer_in_context(question, documents),
        documents=len(documents),
    )
    try:
        verdict = await judge_answer(question, await answer(question, documents), judge)
    except GeneratorError as error:
        return replace(row, failed=str(error) or repr(error))
    return replace(
        row,
        answer=verdict.answer,
        accurate=verdict.correct,
        span=verdict.span,
        em=exact_match(verdict.answer, question.answers),
        f1=f1(verdict.answer, question.answers),
        documents_used=verdict.documents_used,
    )


def summarise(rows: Sequence[ScoredQuestion], config: ScoringConfig) -> ScoreReport:
    """Summarise rows over all, by source and by kind (questions without a kind are in no kind)."""
    return ScoreReport(
        rows=tuple(rows),
        overall=_summary(rows, config),
        by_source=_grouped(rows, lambda row: row.source, config),
        by_kind=_grouped(rows, lambda row: row.kind, config),
    )


def bootstrap_interval(values: Sequence[float], resamples: int, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of `values` (Efron), reproducible for one seed."""
    rng = np.random.default_rng(seed)
    sample = np.asarray(values, dtype=np.float64)
    # One resample at a time: (resamples, n) indices of a large benchmark would not fit into memory.
    means = [sample[rng.integers(0, len(sample), len(sample))].mean() for _ in range(resamples)]
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return float(low), float(high)


def _summary(rows: Sequence[ScoredQuestion], config: ScoringConfig) -> Summary:
    accuracy = [float(row.accurate) for row in rows]
    low, high = bootstrap_interval(accuracy, config.resamples, config.seed)
    recalls = [row.recall for row in rows if row.recall is not None]
    return Summary(
        n=len(rows),
        failed=sum(bool(row.failed) for row in rows),
        accuracy=_mean(accuracy),
        accuracy_low=low,
        accuracy_high=high,
        span=_mean([row.span for row in rows]),
        em=_mean([row.em for row in rows]),
        f1=_mean([row.f1 for row in rows]),
        recall=_mean(recalls) if recalls else None,
        answer_in_context=_mean([row.answer_in_context for row in rows]),
        documents=_mean([row.documents for row in rows]),
    )


def _grouped(
    rows: Sequence[ScoredQuestion], key: Callable[[ScoredQuestion], str], config: ScoringConfig
) -> dict[str, Summary]:
    groups: dict[str, list[ScoredQuestion]] = {}
    for row in rows:
        if key(row):
            groups.setdefault(key(row), []).append(row)
    return {name: _summary(group, config) for name, group in sorted(groups.items())}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _check(questions: Sequence[Question], documents: Mapping[str, Sequence[Document]]) -> None:
    if not questions:
        raise DataError("no questions to score; expected at least one")
    repeated = [id for id, times in Counter(question.id for question in questions).items() if times > 1]
    if repeated:
        raise DataError(f"question id {repeated[0]!r} occurs more than once; ids must be unique, drop the duplicates")
    missing = [question.id for question in questions if question.id not in documents]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(questions)} questions have no documents, first {missing[0]!r}; expected an entry "
            "for each, gather their contexts first (an empty list where nothing was found)"
        )


def _check_failures(rows: Sequence[ScoredQuestion], allowed: float) -> None:
    failed = Counter(row.failed for row in rows if row.failed)
    if failed.total() > allowed * len(rows):
        cause, times = failed.most_common(1)[0]
        raise GeneratorError(
            f"{failed.total()} of {len(rows)} questions could not be scored, above max_failed_fraction={allowed:g}; "
            f"most frequent cause ({times} times): {cause}"
        )
