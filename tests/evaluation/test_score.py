"""Scoring of contexts: rows and means by hand, failures in the denominators, the bootstrap against theory."""

from __future__ import annotations

import math

import pytest

from tests.rewards.fakes import FakeGenerator, FakeJudge, documents, question
from verl.errors import DataError, GeneratorError
from verl.evaluation.score import score_contexts
from verl.evaluation.summary import ScoringConfig, bootstrap_interval

QUESTIONS = [
    question("q/1", source="nq", kind="1-hop", gold_titles=("France",)),
    question("q/2", source="nq", kind="2-hop", gold_titles=("France", "Louvre")),
    question("q/3", source="hotpot", kind="2-hop", gold_titles=()),
    question("q/4", source="hotpot", golds=("Text of Rome", "Lutetia")),
]
FOUND = {
    "q/1": documents("France", "Rome"),
    "q/2": documents("Louvre"),
    "q/3": (),
    "q/4": documents("Rome"),
}
LENIENT = ScoringConfig(max_failed_fraction=1.0)


async def test_rows_and_means_by_hand() -> None:
    generator = FakeGenerator(by_question={"q/1": "Paris", "q/2": "in Paris", "q/3": "Rome", "q/4": "Oslo"})
    report = await score_contexts(QUESTIONS, FOUND, generator)
    rows = report.rows
    assert [row.id for row in rows] == ["q/1", "q/2", "q/3", "q/4"]
    assert [row.accurate for row in rows] == [True, True, False, False]
    assert [row.em for row in rows] == [True, False, False, False]
    assert [row.f1 for row in rows] == pytest.approx([1.0, 2 / 3, 0.0, 0.0])
    assert [row.recall for row in rows] == [1.0, 0.5, None, 0.0]
    assert [row.answer_in_context for row in rows] == [False, False, False, True]
    overall = report.overall
    assert (overall.n, overall.failed, overall.accuracy, overall.span, overall.em) == (4, 0, 0.5, 0.5, 0.25)
    assert overall.f1 == pytest.approx(5 / 12)
    assert overall.recall == pytest.approx(0.5)  # over the three questions that name gold passages
    assert (overall.answer_in_context, overall.documents) == (0.25, 1.0)
    assert 0.0 <= overall.accuracy_low <= 0.5 <= overall.accuracy_high <= 1.0


async def test_breakdowns_by_source_and_kind() -> None:
    generator = FakeGenerator(by_question={"q/1": "Paris", "q/2": "Rome", "q/3": "Paris", "q/4": "Oslo"})
    report = await score_contexts(QUESTIONS, FOUND, generator)
    assert {name: (part.n, part.accuracy) for name, part in report.by_source.items()} == {
        "hotpot": (2, 0.5),
        "nq": (2, 0.5),
    }
    assert {name: (part.n, part.accuracy) for name, part in report.by_kind.items()} == {
        "1-hop": (1, 1.0),
        "2-hop": (2, 0.5),
    }
    assert report.by_kind["1-hop"].recall == 1.0


async def test_failures_stay_in_the_denominator_and_are_listed() -> None:
    generator = FakeGenerator(by_question={"q/2": "!"})
    report = await score_contexts(QUESTIONS[:3], FOUND, generator, config=LENIENT)
    assert report.overall.failed == 1
    assert report.overall.accuracy == pytest.approx(2 / 3)
    assert report.failures == {"q/2": "generator at http://here is down"}
    assert report.rows[1].recall == 0.5  # does not need the generator
    assert report.rows[1].documents_used == 0


async def test_a_failing_judge_is_a_failure_and_a_yes_is_accurate_without_span() -> None:
    asked = [question("q/1"), question("q/2")]
    found = {"q/1": (), "q/2": ()}
    judged = await score_contexts(asked, found, FakeGenerator("the French capital"), FakeJudge(True))
    assert (judged.overall.accuracy, judged.overall.span) == (1.0, 0.0)
    broken = FakeJudge(GeneratorError("judge is down"))
    report = await score_contexts(asked, found, FakeGenerator("Rome"), broken, LENIENT)
    assert report.overall.failed == 2 and report.overall.accuracy == 0.0


async def test_too_many_failures_stop_with_the_most_frequent_cause() -> None:
    generator = FakeGenerator(by_question={"q/1": "!", "q/2": "!"})
    with pytest.raises(GeneratorError, match=r"2 of 4 questions .* is down"):
        await score_contexts(QUESTIONS, FOUND, generator, config=ScoringConfig(max_failed_fraction=0.25))
    report = await score_contexts(QUESTIONS, FOUND, generator, config=ScoringConfig(max_failed_fraction=0.5))
    assert report.overall.failed == 2


async def test_progress_counts_every_question() -> None:
    seen: list[tuple[int, int]] = []
    await score_contexts(QUESTIONS, FOUND, FakeGenerator(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("asked", "found", "message"),
    [
        ([], {}, "no questions"),
        (QUESTIONS, {"q/1": (), "q/2": (), "q/3": ()}, "1 of 4 questions have no documents, first 'q/4'"),
        ([QUESTIONS[0], QUESTIONS[0]], FOUND, "'q/1' occurs more than once"),
    ],
)
async def test_what_does_not_fit_together_is_refused(asked: list, found: dict, message: str) -> None:
    generator = FakeGenerator()
    with pytest.raises(DataError, match=message):
        await score_contexts(asked, found, generator)
    assert generator.seen == []


def test_the_interval_approaches_the_normal_one() -> None:
    values = [1.0] * 300 + [0.0] * 700
    half = 1.959964 * math.sqrt(0.3 * 0.7 / 1000)
    low, high = bootstrap_interval(values, resamples=4000, seed=1)
    assert low == pytest.approx(0.3 - half, abs=0.003)
    assert high == pytest.approx(0.3 + half, abs=0.003)


def test_the_interval_is_reproducible_and_degenerate_where_it_must_be() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert bootstrap_interval(values, 200, 3) == bootstrap_interval(values, 200, 3)
    assert bootstrap_interval([1.0] * 5, 200, 3) == (1.0, 1.0)
