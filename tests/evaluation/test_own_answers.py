"""Figures of policies that answer themselves, by hand."""

from __future__ import annotations

import pytest

from verl.evaluation.own_answers import (
    figures,
    own_answer,
    retrieved_recall,
    searches_after_all_gold,
    stopped_by_itself,
)
from verl.types import Document, Question, SearchResult, Stop, Trajectory, Turn

ASKED = Question("q/1", "Who?", ("Rome", "Roma"), "test", gold_titles=("A", "B"), kind="2-hop")


def document(title: str) -> Document:
    return Document(title.lower(), title, f"text {title}")


def search(*titles: str) -> Turn:
    documents = tuple(map(document, titles))
    return Turn((), "q", query="q", result=SearchResult("q", documents, (0.0,) * len(documents)))


def answer(text: str) -> Turn:
    return Turn((), text, finished=True, answer=text)


STOPPED = Turn((), "<FACT> e\n<FINAL>")
MALFORMED = Turn((), "?", invalid=True)


def trajectory(*turns: Turn, shown: str, stop: Stop = Stop.FINISHED, asked: Question = ASKED) -> Trajectory:
    return Trajectory(asked, (), turns, stop, tuple(map(document, shown)))


def test_enough_too_little_and_too_much() -> None:
    enough = own_answer(trajectory(search("A", "C"), search("D", "B"), STOPPED, answer("Rome"), shown="ACDB"))
    assert (enough.under, enough.over, enough.beyond, enough.extra, enough.recall) == (False, False, False, 0, 1.0)
    assert enough.scores == {"accuracy": 1.0, "em": 1.0, "f1": 1.0, "sub_span": 1.0, "kilt": 1.0}

    little = own_answer(trajectory(search("A", "C"), STOPPED, answer("the Rome."), shown="AC"))
    assert (little.under, little.over, little.beyond, little.extra, little.recall) == (True, False, False, -1, 0.5)
    assert (little.scores["em"], little.scores["kilt"]) == (1.0, 0.0)

    much = own_answer(trajectory(search("A", "B"), search("A"), search("A"), STOPPED, answer("Roman"), shown="AB"))
    assert (much.under, much.over, much.beyond, much.extra) == (False, True, True, 1)
    assert (much.scores["sub_span"], much.scores["accuracy"]) == (1.0, 0.0)


def test_one_more_search_may_be_over_search_within_the_hops() -> None:
    one_hop = Question("q/2", "Who?", ("Rome",), "test", gold_titles=("A",))
    row = own_answer(trajectory(search("A", "B"), search("C"), STOPPED, answer("x"), shown="ABC", asked=ASKED))
    assert (row.over, row.beyond) == (True, False)
    assert own_answer(trajectory(search("A"), STOPPED, answer("x"), shown="A", asked=one_hop)).over is False


def test_the_limit_of_turns_is_no_under_search() -> None:
    at_limit = trajectory(search("A"), search("C"), answer("x"), shown="AC")
    malformed = trajectory(search("A"), MALFORMED, answer("x"), shown="A")
    cut = trajectory(search("A"), search("C"), shown="AC", stop=Stop.LENGTH)
    for one in (at_limit, malformed, cut):
        assert not stopped_by_itself(one)
        assert own_answer(one).under is False


def test_only_what_was_shown_counts_as_seen() -> None:
    """B was retrieved at rank 2 and not shown: evidence is missing, recall@1 and recall@3 tell the difference."""
    one = trajectory(search("A", "B"), STOPPED, answer("x"), shown="A")
    assert searches_after_all_gold(one) is None
    assert (own_answer(one).under, own_answer(one).recall) == (True, 0.5)
    assert (retrieved_recall(one, 1), retrieved_recall(one, 3)) == (0.5, 1.0)


def test_a_failed_question_is_wrong_and_in_no_search_rate() -> None:
    failed = Trajectory(ASKED, (), (search("A"), answer("Rome")), Stop.FAILED, error="gone")
    right = trajectory(search("A", "B"), STOPPED, answer("Rome"), shown="AB")
    bare = trajectory(search("Z"), STOPPED, answer("no"), shown="Z", asked=Question("q/3", "?", ("yes",), "other"))
    found = figures([own_answer(one) for one in (failed, right, bare)], seconds=1.0, resamples=10)
    assert found["em"] == pytest.approx(1 / 3)
    assert (found["n"], found["failed"]) == (3, 1)
    assert (found["recall"], found["under_search"], found["over_search"]) == (1.0, 0.0, 0.0)
    assert found["recall_at"] == {"1": 0.5, "3": 1.0, "5": 1.0, "10": 1.0}
    assert found["by_source"]["other"] == {"accuracy": 0.0, "em": 0.0, "f1": 0.0, "sub_span": 0.0, "kilt": 0.0, "n": 1}
    assert found["own_em"] == pytest.approx((0.5 + 0.0) / 2)


def test_without_gold_passages_there_are_no_search_rates() -> None:
    bare = trajectory(search("Z"), STOPPED, answer("yes"), shown="Z", asked=Question("q/3", "?", ("yes",), "other"))
    found = figures([own_answer(bare)], seconds=0.0, resamples=10)
    assert found["recall"] is None
    assert "under_search" not in found
    with pytest.raises(ValueError, match="at least one question"):
        figures([], 0.0)
