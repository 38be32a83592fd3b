"""Each metric against trec_eval or by hand, denominators, and comparisons."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence

import pytest
import pytrec_eval

from verl.errors import DataError, RetrieverError
from verl.evaluation.query_scores import (
    QueryRow,
    check_failures,
    compare_rows,
    document_scores,
    method_figures,
    nothing,
    score_trajectory,
)
from verl.retrieval.measures import Bootstrap
from verl.types import Document, Question, SearchResult, Stop, Trajectory, Turn

BOOTSTRAP = Bootstrap(resamples=200)


def question(*answers: str, grades: dict[str, int] | None = None, text: str = "Who?") -> Question:
    extra = {} if grades is None else {"grades": json.dumps(grades)}
    return Question("set/test/0", text, answers, "set_test", extra=extra)


def found(*ids: str, texts: Sequence[str] = ()) -> tuple[Document, ...]:
    return tuple(Document(id, "", texts[at] if texts else "") for at, id in enumerate(ids))


def trec(measure: str, grades: dict[str, int], ids: Sequence[str]) -> float:
    run = {id: float(len(ids) - rank) for rank, id in enumerate(ids)}
    (value,) = pytrec_eval.RelevanceEvaluator({"q": grades}, {measure}).evaluate({"q": run})["q"].values()
    return value


@pytest.mark.parametrize("seed", range(20))
def test_ndcg_and_recall_are_those_of_trec_eval(seed: int) -> None:
    rng = random.Random(seed)
    pool = [f"d{n}" for n in range(40)]
    grades = {id: rng.choice([0, 1, 1, 2, 3]) for id in rng.sample(pool, 15)} | {"d0": 1}
    relevant = [id for id, grade in grades.items() if grade]
    ids = rng.sample(pool, rng.choice([1, 7, 30]))
    asked = question(*relevant, grades=grades)
    assert document_scores("ndcg", asked, found(*ids))["ndcg@10"] == pytest.approx(trec("ndcg_cut.10", grades, ids))
    recall = document_scores("recall", asked, found(*ids))["recall@3000"]
    assert recall == pytest.approx(trec("recall.3000", grades, ids))


def test_recall_looks_at_the_first_3000_and_counts_each_target_once() -> None:
    ids = [f"x{n}" for n in range(2999)]
    asked = question("A", "B", "A")
    assert document_scores("recall", asked, found(*ids, "A", "B")) == {"recall@3000": 0.5}
    assert document_scores("recall", asked, found("A", "A", "B")) == {"recall@3000": 1.0}


def test_hits_by_hand() -> None:
    texts = ["about Rome"] * 5 + ["Parisian life", "I love PARIS!", "Paris"]
    documents = found(*"abcdefgh", texts=texts)
    assert document_scores("hits", question("Paris"), documents) == {
        "hit@1": 0.0,
        "hit@5": 0.0,
        "hit@10": 1.0,
        "hit@20": 1.0,
        "hit@50": 1.0,
        "hit@100": 1.0,
    }
    repeated = (*documents[:1] * 9, documents[7])
    assert document_scores("hits", question("Paris"), repeated)["hit@5"] == 1, "a document has one rank"
    late = found(*map(str, range(101)), texts=["no"] * 100 + ["Paris"])
    assert set(document_scores("hits", question("Paris"), late).values()) == {0.0}


def test_execution_is_not_about_documents() -> None:
    with pytest.raises(ValueError, match="not about documents"):
        document_scores("execution", question("x"), ())


def ended(query: str | None, ids: Sequence[str] = (), note: str = "") -> Trajectory:
    result = None if query is None else SearchResult(query, found(*ids), (1.0,) * len(ids))
    turn = Turn((), "text", query=query, finished=True, invalid=bool(note), result=result, note=note)
    return Trajectory(question("A", "B"), (), (turn,), Stop.FINISHED)


def test_a_trajectory_is_judged_by_what_its_last_query_found() -> None:
    row = asyncio.run(score_trajectory("recall", ended("a OR b", ["A", "x"])))
    assert (row.query, row.scores, row.documents, row.failed) == ("a OR b", {"recall@3000": 0.5}, 2, "")


def test_what_cannot_be_read_is_worth_nothing_and_says_why() -> None:
    row = asyncio.run(score_trajectory("hits", ended(None, note="<answer> occurs 0 times, expected once")))
    assert row.query is None and set(row.scores.values()) == {0.0} and row.note.startswith("<answer>")
    never_asked = Trajectory(question("A"), (), (), Stop.LENGTH)
    assert asyncio.run(score_trajectory("recall", never_asked)).note == "the prompt is too long"


def row(id: str, value: float | None, source: str = "s", failed: str = "", **more: object) -> QueryRow:
    scores = nothing("recall") if value is None else {"recall@3000": value}
    return QueryRow(id, source, None if value is None else "q", scores, failed=failed, **more)  # type: ignore[arg-type]


ROWS = [row("1", 1.0), row("2", 0.5, "t"), row("3", None, note="no tags"), row("4", None, failed="away")]


def test_failures_stay_in_the_denominator_and_are_counted() -> None:
    figures = method_figures(ROWS, "recall", BOOTSTRAP)
    assert figures["recall"] == figures["scores"]["recall@3000"] == 0.375
    assert (figures["n"], figures["failed"], figures["unreadable"], figures["valid"]) == (4, 1, 1, 0.5)
    assert figures["accuracy"] is None and figures["searches"] == 0.5
    low, high = figures["score_intervals"]["recall@3000"]
    assert 0 <= low < 0.375 < high <= 1
    assert {source: found["recall"] for source, found in figures["by_source"].items()} == {
        "s": pytest.approx(1 / 3),
        "t": 0.5,
    }
    assert "injection" not in figures


def test_too_many_failures_are_an_error() -> None:
    check_failures("m", ROWS, 0.25)
    with pytest.raises(RetrieverError, match=r"m: 1 of 4 questions failed.*\(1 times\): away"):
        check_failures("m", ROWS, 0.2)


def test_injection_figures_by_hand() -> None:
    rows = [
        row("1", 1.0, injected=("Paris",), filtered="capital", filtered_scores={"recall@3000": 0.25}),
        row("2", 0.5, injected=()),
        row("3", 0.0, injected=(), filtered="", filtered_scores={"recall@3000": 0.0}, filter_failed="away"),
        row("4", None, injected=()),
    ]
    found = method_figures(rows, "recall", BOOTSTRAP)["injection"]
    assert (found["injected"], found["changed"], found["failed"]) == (0.25, 2, 1)
    assert found["scores"]["recall@3000"] == (0.25 + 0.5 + 0 + 0) / 4
    assert (found["before"]["recall@3000"], found["after"]["recall@3000"]) == (0.5, 0.125)


def test_methods_are_compared_question_by_question() -> None:
    theirs = [row("1", 0.0), row("2", 0.5), row("3", 0.25), row("4", 0.0)]
    compared = compare_rows(ROWS, theirs, "recall", BOOTSTRAP)
    assert (compared.n, compared.won, compared.lost, compared.p) == (4, 1, 1, 1.0)
    assert compared.difference == pytest.approx((1.0 + 0 - 0.25 + 0) / 4)
    with pytest.raises(DataError, match="asked of one method only, the first is '4'"):
        compare_rows(ROWS, theirs[:3], "recall", BOOTSTRAP)
