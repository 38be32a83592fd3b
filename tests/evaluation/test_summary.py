"""Comparisons of methods and passage metrics, against hand computation, scipy and pytrec_eval's definitions."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from tests.rewards.fakes import documents, question
from verl.errors import DataError
from verl.evaluation.passages import passage_metrics
from verl.evaluation.summary import ScoredQuestion, ScoringConfig, bootstrap_interval, compare, mcnemar, summarise

QUICK = ScoringConfig(resamples=200)


def row(id: str, accurate: bool, source: str = "nq", **more: object) -> ScoredQuestion:
    return ScoredQuestion(id, source, "", None, False, 0, accurate=accurate, **more)  # type: ignore[arg-type]


def test_a_comparison_by_hand() -> None:
    mine = [row(str(n), n < 6) for n in range(8)]
    theirs = [row(str(n), n in (0, 7)) for n in reversed(range(8))]
    compared = compare(mine, theirs, QUICK)
    assert (compared.n, compared.won, compared.lost, compared.difference) == (8, 5, 1, 0.5)
    assert compared.low <= 0.5 <= compared.high
    assert compared.p == pytest.approx(2 * (1 + 6) / 2**6)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test(won: int, lost: int) -> None:
    expected = binomtest(won, won + lost, 0.5).pvalue if won + lost else 1.0
    assert mcnemar(won, lost) == pytest.approx(expected, rel=1e-9)


def test_methods_on_other_questions_are_not_compared() -> None:
    with pytest.raises(DataError, match=r"2 questions were asked of one method only, the first is 'a'"):
        compare([row("a", True), row("b", True)], [row("b", True), row("c", True)], QUICK)


def test_the_average_over_sources_and_own_answers() -> None:
    rows = [row("a", True), row("b", False), row("c", True, "pop"), row("d", True, "pop", own_answer="x", own_em=True)]
    report = summarise(rows, QUICK)
    assert report.overall.accuracy == 0.75 and report.macro_accuracy == (0.5 + 1.0) / 2
    assert report.overall.own_em == 0.25, "a question without an own answer counts as wrong"
    assert report.by_source["nq"].own_em is None


def test_judge_parts_are_averaged_over_the_rows_that_have_them() -> None:
    rows = [row("a", True), row("b", True, judge={"judged_yes": 1.0}), row("c", True, judge={"judged_yes": 0.0})]
    assert summarise(rows, QUICK).overall.judge == {"judged_yes": 0.5}


def test_every_mean_has_its_interval_over_the_rows_that_it_is_over() -> None:
    found = {"gold_precision": 0.5, "ndcg": 1.0, "reciprocal_rank": 1.0}
    rows = [replace(row(str(n), n < 6, f1=n / 8, **found), recall=float(n % 2)) for n in range(8)]
    rows.append(row("bare", False, tokens=90))
    overall = summarise(rows, ScoringConfig(resamples=400, seed=3)).overall
    assert overall.intervals["accuracy"] == (overall.accuracy_low, overall.accuracy_high)
    for name, values in {"f1": [r.f1 for r in rows], "recall": [0.0, 1.0] * 4}.items():
        assert overall.intervals[name] == pytest.approx(bootstrap_interval(values, 400, 3), abs=1e-12)
        assert overall.intervals[name][0] < getattr(overall, name) < overall.intervals[name][1]
    assert overall.intervals["ndcg"] == (1.0, 1.0) and overall.intervals["tokens"][1] > 10.0
    assert "own_em" not in overall.intervals, "no question was answered by the searcher itself"


def test_passage_metrics_by_hand() -> None:
    asked = question("q", gold_titles=("France", "Louvre", "Seine"))
    found = passage_metrics(asked, documents("Rome", "france", "Louvre", "France"))
    assert found is not None
    assert (found.recall, found.precision, found.reciprocal_rank) == (2 / 3, 2 / 3, 0.5)
    ideal = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    assert found.ndcg == pytest.approx((1 / math.log2(3) + 1 / math.log2(4)) / ideal)
    nothing = passage_metrics(asked, ())
    assert nothing is not None and nothing.recall == nothing.precision == nothing.ndcg == 0.0
    assert passage_metrics(question("q", gold_titles=()), documents("Rome")) is None


def test_passage_metrics_of_10000_contexts_agree_with_their_definitions() -> None:
    """Titles come twice, in other spellings and not at all; trec_eval's gain is 1 and its discount log2(rank + 1)."""
    draw = random.Random(0)
    titles = [f"Title {letter}" for letter in "ABCDEFGHIJ"]
    for number in range(10_000):
        gold = draw.sample(titles, draw.randint(1, 4))
        shown = [draw.choice(titles) for _ in range(draw.randint(0, 12))]
        spelt = [draw.choice([title, f"The {title.upper()}", f"{title}!"]) for title in shown]
        found = passage_metrics(question(str(number), gold_titles=tuple(gold)), documents(*spelt))
        ranked = list(dict.fromkeys(shown))
        ranks = [rank for rank, title in enumerate(ranked, start=1) if title in gold]
        ideal = sum(1 / math.log2(rank + 1) for rank in range(1, len(gold) + 1))
        assert found is not None
        assert found.recall == len(ranks) / len(gold)
        assert found.precision == (len(ranks) / len(ranked) if ranked else 0.0)
        assert found.reciprocal_rank == pytest.approx(1 / ranks[0] if ranks else 0.0)
        assert found.ndcg == pytest.approx(sum(1 / math.log2(rank + 1) for rank in ranks) / ideal)
