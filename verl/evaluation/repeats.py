"""How repeatable a frozen generator is: the same contexts, asked again and again, with every cache out of the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from verl.evaluation.summary import ScoredQuestion, ScoreReport, ScoringConfig, bootstrap_interval


@dataclass(frozen=True, slots=True)
class Rate:
    """A mean over `n` questions, at least one, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float], config: ScoringConfig) -> Rate:
        """Return the mean of `values`, at least one."""
        low, high = bootstrap_interval(values, config.resamples, config.seed)
        return cls(sum(values) / len(values), low, high, len(values))


@dataclass(frozen=True, slots=True)
class Repeatability:
    """How often asking again gives the same.

    Attributes:
        repeats: how often each question was asked.
        failed: questions that could not be asked every time; they are in no figure here.
        seeds: of the repeats, None where none is sent.
        same_verdict, same_answer: share of questions with all verdicts, or all answers to the letter, alike.
        pair_verdict, pair_answer: chance that two repeats are alike, which does not depend on how many there are.
        accuracies: of each repeat.
        by_source: `pair_verdict` by source.
    """

    repeats: int
    failed: int
    temperature: float
    seeds: tuple[int | None, ...]
    same_verdict: Rate
    same_answer: Rate
    pair_verdict: Rate
    pair_answer: Rate
    accuracies: tuple[float, ...]
    by_source: Mapping[str, Rate]


def summarise_repeats(
    repeats: Sequence[ScoreReport], temperature: float, seeds: Sequence[int | None], config: ScoringConfig
) -> Repeatability | None:
    """Compare repeats of the same questions; None if no question was answered every time."""
    by_id: dict[str, list[ScoredQuestion]] = {}
    for report in repeats:
        for row in report.rows:
            by_id.setdefault(row.id, []).append(row)
    whole = [by_id[id] for id in sorted(by_id) if not any(row.failed for row in by_id[id])]
    if not whole:
        return None
    verdicts = [[row.accurate for row in rows] for rows in whole]
    answers = [[row.answer for row in rows] for rows in whole]
    by_source: dict[str, list[float]] = {}
    for rows, several in zip(whole, verdicts, strict=True):
        by_source.setdefault(rows[0].source, []).append(pair_agreement(several))
    return Repeatability(
        repeats=len(repeats),
        failed=len(by_id) - len(whole),
        temperature=temperature,
        seeds=tuple(seeds),
        same_verdict=Rate.of([float(len(set(several)) == 1) for several in verdicts], config),
        same_answer=Rate.of([float(len(set(several)) == 1) for several in answers], config),
        pair_verdict=Rate.of([pair_agreement(several) for several in verdicts], config),
        pair_answer=Rate.of([pair_agreement(several) for several in answers], config),
        accuracies=tuple(sum(column) / len(whole) for column in zip(*verdicts, strict=True)),
        by_source={source: Rate.of(values, config) for source, values in sorted(by_source.items())},
    )


def pair_agreement(values: Sequence[Hashable]) -> float:
    """Return the share of the pairs among `values`, at least two, that are equal."""
    n = len(values)
    return sum(count * (count - 1) for count in Counter(values).values()) / (n * (n - 1))
