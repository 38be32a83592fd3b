"""Means over scored questions, with bootstrap intervals, and paired comparisons of two methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from verl.errors import DataError
from verl.rewards.evidence import Judging


@dataclass(frozen=True, slots=True)
class ScoringConfig:
    """How answers are judged and scores are summarised.

    Attributes:
        judging: when a judge, if there is one, is asked.
        resamples: bootstrap resamples behind each interval.
        seed: of the bootstrap.
        max_failed_fraction: a larger share of failed questions is an error, because the figures would mean little.
    """

    judging: Judging = "when_needed"
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
        recall, gold_precision, ndcg, reciprocal_rank: of the gold passages (`verl.evaluation.passages`), None if the
            question names none.
        documents: number of documents given; `documents_used` of them fitted into the generator's prompt.
        accurate: span match, else the judge's yes (generation accuracy).
        sub_span, strict: see `verl.rewards.text`; `precision` and `token_recall` are the parts of `f1`.
        judge: what the judge did, see `verl.rewards.evidence.Verdict.judge_parts`.
        failed: the cause if the generator or the judge could not be asked, else empty.
        searches, tokens, seconds: what gathering the documents took.
        own_answer: the searcher's own answer, None where it gave none; `own_accurate` is its span match.
    """

    id: str
    source: str
    kind: str
    recall: float | None
    answer_in_context: bool
    documents: int
    gold_precision: float | None = None
    ndcg: float | None = None
    reciprocal_rank: float | None = None
    documents_used: int = 0
    answer: str = ""
    accurate: bool = False
    span: bool = False
    em: bool = False
    f1: float = 0.0
    sub_span: bool = False
    strict: bool = False
    precision: float = 0.0
    token_recall: float = 0.0
    judge: Mapping[str, float] = field(default_factory=dict)
    failed: str = ""
    searches: int = 0
    tokens: int = 0
    seconds: float = 0.0
    own_answer: str | None = None
    own_accurate: bool = False
    own_em: bool = False
    own_f1: float = 0.0


_ANSWERS = ("span", "em", "f1", "sub_span", "strict", "precision", "token_recall")
_RATES = (*_ANSWERS, "answer_in_context")
_COSTS = ("documents", "searches", "tokens", "seconds")
_PASSAGES = ("recall", "gold_precision", "ndcg", "reciprocal_rank")
_OWN = ("own_accurate", "own_em", "own_f1")

OF_ANSWERS = ("accuracy", *_ANSWERS)
"""The figures of a summary that the generator's answers decide."""

ABOUT_ANSWERS = (*_ANSWERS, "documents_used", "answer", "accurate", "judge", "failed")
"""The fields of a `ScoredQuestion` that say nothing where no generator was asked."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Means over `n` questions, in [0, 1] but for the costs (documents, searches, tokens, seconds a question).

    Attributes:
        failed: questions without an answer; they are among the `n` and count as not accurate.
        accuracy_low, accuracy_high: 95 % percentile bootstrap interval of `accuracy`.
        recall, gold_precision, ndcg, reciprocal_rank: over the questions that name gold passages, None if none does.
        judge: mean of each part over the questions that have it.
        own_accurate, own_em, own_f1: of the searcher's own answers, over all questions; None if it gave none at all.
        intervals: 95 % percentile bootstrap interval (low, high) of every mean here that is not None, by its name.
    """

    n: int
    failed: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    span: float
    em: float
    f1: float
    sub_span: float
    strict: float
    precision: float
    token_recall: float
    answer_in_context: float
    documents: float
    searches: float
    tokens: float
    seconds: float
    recall: float | None
    gold_precision: float | None
    ndcg: float | None
    reciprocal_rank: float | None
    own_accurate: float | None
    own_em: float | None
    own_f1: float | None
    judge: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ScoreReport:
    """All rows, in the order of the questions, and their summaries.

    Attributes:
        macro_accuracy: mean of the sources' accuracies, the "average" of the papers' tables.
    """

    rows: tuple[ScoredQuestion, ...]
    overall: Summary
    by_source: Mapping[str, Summary] = field(default_factory=dict)
    by_kind: Mapping[str, Summary] = field(default_factory=dict)

    @property
    def macro_accuracy(self) -> float:
        """See the class."""
        return _mean([summary.accuracy for summary in self.by_source.values()])

    @property
    def failures(self) -> Mapping[str, str]:
        """Cause of each question that could not be scored, by its id."""
        return {row.id: row.failed for row in self.rows if row.failed}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One method against another on the same questions.

    Attributes:
        difference: of accuracy; `low` to `high` is its 95 % percentile bootstrap interval over questions.
        won, lost: questions that only the one, or only the other, answers accurately.
        p: two-sided exact McNemar test of `won` against `lost`.
    """

    n: int
    difference: float
    low: float
    high: float
    won: int
    lost: int
    p: float


def summarise(rows: Sequence[ScoredQuestion], config: ScoringConfig) -> ScoreReport:
    """Summarise rows over all, by source and by kind (questions without a kind are in no kind)."""
    return ScoreReport(
        rows=tuple(rows),
        overall=_summary(rows, config),
        by_source=_grouped(rows, lambda row: row.source, config),
        by_kind=_grouped(rows, lambda row: row.kind, config),
    )


def compare(rows: Sequence[ScoredQuestion], against: Sequence[ScoredQuestion], config: ScoringConfig) -> Comparison:
    """Compare two methods question by question.

    Raises:
        DataError: they were not asked the same questions.
    """
    mine = {row.id: row.accurate for row in rows}
    theirs = {row.id: row.accurate for row in against}
    if mine.keys() != theirs.keys():
        only = sorted(mine.keys() ^ theirs.keys())
        raise DataError(
            f"{len(only)} questions were asked of one method only, the first is {only[0]!r}; compare methods on the "
            "same questions"
        )
    differences = [float(mine[id]) - float(theirs[id]) for id in mine]
    won, lost = differences.count(1.0), differences.count(-1.0)
    low, high = bootstrap_interval(differences, config.resamples, config.seed)
    return Comparison(len(differences), _mean(differences), low, high, won, lost, mcnemar(won, lost))


def mcnemar(won: int, lost: int) -> float:
    """Return the two-sided p-value of McNemar's exact test: a fair coin at each question that the methods differ on."""
    n = won + lost
    tail = sum(math.comb(n, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2**n)


def bootstrap_interval(values: Sequence[float], resamples: int, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of `values` (Efron), reproducible for one seed."""
    return bootstrap_intervals({"mean": values}, resamples, seed, level)["mean"]


def bootstrap_intervals(
    columns: Mapping[str, Sequence[float]], resamples: int, seed: int, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Return the interval of every column's mean; columns are about the same questions and share the resamples."""
    rng = np.random.default_rng(seed)
    sample = np.array([list(values) for values in columns.values()], dtype=np.float64)  # (C, n)
    size = sample.shape[1]
    # One resample at a time: (resamples, n) indices of a large benchmark would not fit into memory.
    means = np.array(
        [sample @ np.bincount(rng.integers(0, size, size), minlength=size) / size for _ in range(resamples)]
    )
    tail = (1.0 - level) / 2.0
    lows, highs = np.quantile(means, [tail, 1.0 - tail], axis=0)
    return {name: (float(low), float(high)) for name, low, high in zip(columns, lows, highs, strict=True)}


def _summary(rows: Sequence[ScoredQuestion], config: ScoringConfig) -> Summary:
    columns = {"accuracy": [float(row.accurate) for row in rows]}
    columns |= {name: [float(getattr(row, name)) for row in rows] for name in _RATES + _COSTS}
    if any(row.own_answer is not None for row in rows):
        columns |= {name: [float(getattr(row, name)) for row in rows] for name in _OWN}
    named = [row for row in rows if row.recall is not None]
    passages = {name: [float(getattr(row, name) or 0.0) for row in named] for name in _PASSAGES} if named else {}
    intervals = bootstrap_intervals(columns, config.resamples, config.seed)
    if passages:
        intervals |= bootstrap_intervals(passages, config.resamples, config.seed)
    means = {name: _mean(values) for name, values in (columns | passages).items()}
    low, high = intervals["accuracy"]
    parts = dict.fromkeys(part for row in rows for part in row.judge)
    return Summary(
        n=len(rows),
        failed=sum(bool(row.failed) for row in rows),
        accuracy_low=low,
        accuracy_high=high,
        **(dict.fromkeys(_PASSAGES + _OWN) | means),
        judge={part: _mean([row.judge[part] for row in rows if part in row.judge]) for part in parts},
        intervals=intervals,
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
