from __future__ import annotations

import math
import random

import pytest

from verl.errors import DataError
from verl.retrieval.measures import MEASURES, Bootstrap, score_run
from verl.retrieval.trec import Qrels, Run, ranking


def by_hand(order: list[str], grades: dict[str, int]) -> dict[str, float]:
    """Compute every measure of one query from its definition."""
    relevant = {document for document, grade in grades.items() if grade > 0}
    gains = [max(grades.get(document, 0), 0) / math.log2(at + 2) for at, document in enumerate(order[:10])]
    best = sorted((grade for grade in grades.values() if grade > 0), reverse=True)[:10]
    ideal = sum(grade / math.log2(at + 2) for at, grade in enumerate(best))
    ranks = [at + 1 for at, document in enumerate(order) if document in relevant]
    values = {f"recall@{k}": len(relevant & set(order[:k])) / len(relevant) for k in (5, 10, 20, 100)}
    values["ndcg@10"] = sum(gains) / ideal
    values["mrr@10"] = 1 / ranks[0] if ranks and ranks[0] <= 10 else 0.0
    values["map"] = sum((found + 1) / rank for found, rank in enumerate(ranks)) / len(relevant)
    return values


def random_case(rng: random.Random) -> tuple[Run, Qrels, dict[str, list[str]]]:
    """Draw a run with many equal scores, and graded judgements, some of them negative."""
    documents = [f"d{n}" for n in range(150)]
    orders, run, qrels = {}, {}, {}
    for query in map(str, range(40)):
        orders[query] = rng.sample(documents, rng.choice([0, 1, 5, 30, 120]))
        scores = sorted((rng.choice([0.1, 0.5, 2.0]) for _ in orders[query]), reverse=True)
        run[query] = ranking(orders[query], scores)
        judged = rng.sample(documents, rng.randint(1, 20))
        qrels[query] = {judged[0]: rng.randint(1, 3)} | {document: rng.randint(-1, 3) for document in judged[1:]}
    return run, qrels, orders


def test_every_measure_is_its_definition_and_the_order_is_the_one_given() -> None:
    run, qrels, orders = random_case(random.Random(0))
    scores = score_run(run, qrels)
    assert scores.per_query.keys() == qrels.keys()
    for query, values in scores.per_query.items():
        assert values == pytest.approx(by_hand(orders[query], dict(qrels[query])), abs=1e-6), query
    for name in MEASURES:
        mean = sum(values[name] for values in scores.per_query.values()) / len(qrels)
        assert scores.estimates[name].mean == pytest.approx(mean, abs=1e-12)
    assert scores.without_hits == sum(not order for order in orders.values()) > 0


@pytest.mark.parametrize("missing", [{}, {"q2": {}}])
def test_a_query_without_a_hit_counts_as_zero(missing: Run) -> None:
    scores = score_run({"q1": {"d": 1.0}, **missing}, {"q1": {"d": 1}, "q2": {"d": 1}})
    assert scores.per_query["q2"] == dict.fromkeys(MEASURES, 0.0)
    assert {name: estimate.mean for name, estimate in scores.estimates.items()} == dict.fromkeys(MEASURES, 0.5)
    assert (scores.without_hits, scores.without_relevant) == (1, 0)


def test_a_query_without_a_relevant_document_is_left_out_and_one_not_judged_too() -> None:
    scores = score_run({"q1": {"d": 1.0}, "q9": {"d": 1.0}}, {"q1": {"d": 1}, "q2": {"d": 0}, "q3": {"d": -1}})
    assert scores.per_query.keys() == {"q1"} and scores.without_relevant == 2


@pytest.mark.parametrize(("rank", "expected"), [(1, 1.0), (9, 1 / 9), (10, 0.1), (11, 0.0), (12, 0.0)])
def test_the_reciprocal_rank_ends_at_ten(rank: int, expected: float) -> None:
    run = {"q": ranking([f"d{n}" for n in range(1, 20)], [float(-n) for n in range(1, 20)])}
    assert score_run(run, {"q": {f"d{rank}": 1}}).per_query["q"]["mrr@10"] == pytest.approx(expected, abs=1e-9)


def test_only_the_measures_asked_for_are_computed() -> None:
    scores = score_run({"q": {"d": 1.0}}, {"q": {"d": 1}}, ("recall@5", "mrr@10"))
    assert list(scores.estimates) == ["recall@5", "mrr@10"] == list(scores.per_query["q"])


def test_an_empty_run_is_all_zero_and_empty_judgements_are_refused() -> None:
    assert score_run({}, {"q": {"d": 1}}).estimates["map"].mean == 0.0
    with pytest.raises(DataError, match="hold no relevant document"):
        score_run({}, {"q": {"d": 0}})


def test_the_interval_is_that_of_the_mean() -> None:
    """Of n queries with 0 or 1, the mean has the standard error sqrt(p (1 - p) / n)."""
    qrels = {str(n): {"d": 1} for n in range(400)}
    run = {str(n): {"d" if n % 4 else "other": 1.0} for n in range(400)}
    estimate = score_run(run, qrels, ("recall@5",)).estimates["recall@5"]
    error = math.sqrt(0.75 * 0.25 / 400)
    assert estimate.mean == 0.75
    assert estimate.low == pytest.approx(0.75 - 1.96 * error, abs=0.2 * error)
    assert estimate.high == pytest.approx(0.75 + 1.96 * error, abs=0.2 * error)


def test_the_interval_is_reproducible_and_shrinks_to_a_point_where_all_are_equal() -> None:
    run, qrels, _ = random_case(random.Random(1))
    assert score_run(run, qrels).estimates == score_run(run, qrels).estimates
    assert score_run(run, qrels, bootstrap=Bootstrap(seed=1)).estimates != score_run(run, qrels).estimates
    estimate = score_run({"a": {"d": 1.0}, "b": {"d": 1.0}}, {"a": {"d": 1}, "b": {"d": 1}}).estimates["map"]
    assert (estimate.low, estimate.mean, estimate.high) == (1.0, 1.0, 1.0)
