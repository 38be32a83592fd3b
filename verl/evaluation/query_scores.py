"""What a query, or a SQL statement, is worth: one row a question, and means over all that were asked.

| metric | values | published as |
|---|---|---|
| `recall` | `recall@3000`: share of the target ids among the first 3,000 documents | PubMed, ClinicalTrials.gov |
| `hits` | `hit@1` ... `hit@100`: an answer stands in one of the first k texts (DPR) | NQ, TriviaQA, SQuAD |
| `ndcg` | `ndcg@10`: linear gain, ideal order by grade | BEIR, MS MARCO |
| `execution` | `execution_accuracy`, and `executed`: the statement ran | BIRD, Spider |

Denominators: every question that was asked. One whose answer could not be read, or that a service failed, counts with 0
everywhere; the latter are listed with their cause besides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from verl.errors import DataError, RetrieverError
from verl.evaluation.summary import Comparison, bootstrap_interval, mcnemar
from verl.retrieval.measures import Bootstrap
from verl.rewards.ndcg import judged, ndcg
from verl.rewards.rank import distinct, first_hit, id_recall
from verl.rewards.registry import Scorer
from verl.types import Document, Question, Trajectory, Turn

Metric = Literal["recall", "hits", "ndcg", "execution"]
HIT_RANKS = (1, 5, 10, 20, 50, 100)
RECALL_DEPTH, NDCG_DEPTH = 3000, 10
DEPTH: Mapping[Metric, int] = {"recall": RECALL_DEPTH, "hits": max(HIT_RANKS), "ndcg": NDCG_DEPTH, "execution": 0}
"""How many documents of a query each metric looks at."""
HEADLINE: Mapping[Metric, str] = {
    "recall": f"recall@{RECALL_DEPTH}",
    "hits": "hit@20",
    "ndcg": f"ndcg@{NDCG_DEPTH}",
    "execution": "execution_accuracy",
}
"""The value that stands for each metric where there is room for one."""


@dataclass(frozen=True, slots=True)
class QueryRow:
    """One question.

    Attributes:
        query: what was searched, or the statement; None where the answer could not be read.
        note: why not.
        scores: the metric's values, in [0, 1].
        documents: how many the query found, at most as many as were asked for.
        failed: the cause if a service failed; the scores are 0 then.
        tokens, seconds: that the policy sampled, and that the question took.
        injected: answers that the query gives and the question does not; None where that was not looked at.
        filtered: the query without them, and its scores; None where nothing was changed.
        filter_failed: the cause if the filter, or the search after it, failed; the filtered scores are 0 then.
    """

    id: str
    source: str
    query: str | None
    scores: Mapping[str, float]
    documents: int = 0
    note: str = ""
    failed: str = ""
    tokens: int = 0
    seconds: float = 0.0
    injected: tuple[str, ...] | None = None
    filtered: str | None = None
    filtered_scores: Mapping[str, float] = field(default_factory=dict)
    filter_failed: str = ""

    @property
    def final(self) -> Mapping[str, float]:
        """The scores with the answer-injection filter: those of the query as it is where nothing was changed."""
        return self.scores if self.filtered is None else self.filtered_scores


def document_scores(metric: Metric, question: Question, documents: Sequence[Document]) -> dict[str, float]:
    """Return what the documents of one query are worth, each document at its first place.

    Raises:
        DataError: the question's judgements cannot be read.
        ValueError: `execution` is not about documents.
    """
    if metric == "recall":
        return {HEADLINE[metric]: id_recall(question.answers, documents[:RECALL_DEPTH])}
    if metric == "ndcg":
        return {HEADLINE[metric]: ndcg(judged(question), documents, NDCG_DEPTH)}
    if metric == "hits":
        rank = first_hit(question.answers, distinct(documents)[: max(HIT_RANKS)])
        return {f"hit@{k}": float(rank is not None and rank <= k) for k in HIT_RANKS}
    raise ValueError(f"{metric} is not about documents")


def nothing(metric: Metric) -> dict[str, float]:
    """Return the scores of a question without a readable answer."""
    if metric == "execution":
        return {HEADLINE[metric]: 0.0, "executed": 0.0}
    return dict.fromkeys([f"hit@{k}" for k in HIT_RANKS] if metric == "hits" else [HEADLINE[metric]], 0.0)


async def execution_scores(scorer: Scorer, trajectory: Trajectory) -> dict[str, float]:
    """Return whether the trajectory's statement returns what the gold returns, and whether it ran.

    Raises:
        RetrieverError: nothing can be compared, for example because the database is not there.
    """
    outcome = await scorer(trajectory)
    if outcome.failed:
        raise RetrieverError(outcome.failed)
    return {HEADLINE["execution"]: outcome.parts["accuracy"], "executed": outcome.parts["executed"]}


async def score_trajectory(metric: Metric, trajectory: Trajectory, scorer: Scorer | None = None) -> QueryRow:
    """Score one trajectory that ends with a query, or a statement.

    Args:
        scorer: of `execution_accuracy`, for the metric `execution`.

    Raises:
        DataError: the trajectory has no query, or fewer documents were asked for than the metric looks at.
    """
    question = trajectory.question
    turn = trajectory.turns[-1] if trajectory.turns else Turn((), "", invalid=True, note="the prompt is too long")
    said = turn.answer if metric == "execution" else turn.query
    row = QueryRow(question.id, question.source, said, nothing(metric), note=turn.note)
    try:
        if metric == "execution":
            assert scorer is not None
            return _with(row, await execution_scores(scorer, trajectory)) if trajectory.turns else row
        documents = turn.result.documents if turn.result else ()
        return _with(row, document_scores(metric, question, documents), len(documents)) if turn.result else row
    except RetrieverError as error:
        return _with(row, nothing(metric), failed=str(error))


def _with(row: QueryRow, scores: Mapping[str, float], documents: int = 0, failed: str = "") -> QueryRow:
    return QueryRow(row.id, row.source, row.query, scores, documents, row.note, failed)


def method_figures(rows: Sequence[QueryRow], metric: Metric, bootstrap: Bootstrap) -> dict[str, Any]:
    """Return one method's row of a report, as `verl.evaluation.report.write_report` takes it."""
    n = len(rows)
    searched = sum(row.query is not None for row in rows)
    figures: dict[str, Any] = {
        "n": n,
        "headline": HEADLINE[metric],
        "failed": sum(bool(row.failed) for row in rows),
        "unreadable": sum(row.query is None and not row.failed for row in rows),
        "documents": _mean([row.documents for row in rows]),
        "searches": 0.0 if metric == "execution" else searched / n,
        "tokens": _mean([row.tokens for row in rows]),
        "seconds_per_question": _mean([row.seconds for row in rows]),
        "valid": sum(row.query is not None and not row.note for row in rows) / n,
        "scores": _means([row.scores for row in rows]),
        "score_intervals": _intervals([row.scores for row in rows], bootstrap),
        "by_source": {source: _of_source(found, metric) for source, found in _by_source(rows).items()},
    }
    if any(row.injected is not None for row in rows):
        figures["injection"] = injection_figures(rows, bootstrap)
    headline = HEADLINE[metric]
    mean, interval = figures["scores"][headline], figures["score_intervals"][headline]
    accuracy = mean if metric == "execution" else None
    figures |= {"accuracy": accuracy, "recall": mean if metric == "recall" else None}
    if metric == "execution":
        figures["accuracy_interval"] = interval
        figures["macro_accuracy"] = _mean([found["accuracy"] for found in figures["by_source"].values()])
    return figures


def injection_figures(rows: Sequence[QueryRow], bootstrap: Bootstrap) -> dict[str, Any]:
    """Return how many queries give an answer away, and what the queries are worth without it.

    `scores` are over all questions; `before` and `after` over those that were changed.
    """
    changed = [row for row in rows if row.filtered is not None]
    return {
        "injected": sum(bool(row.injected) for row in rows) / len(rows),
        "changed": len(changed),
        "failed": sum(bool(row.filter_failed) for row in rows),
        "scores": _means([row.final for row in rows]),
        "score_intervals": _intervals([row.final for row in rows], bootstrap),
        "before": _means([row.scores for row in changed]),
        "after": _means([row.final for row in changed]),
    }


def compare_rows(
    rows: Sequence[QueryRow], against: Sequence[QueryRow], metric: Metric, bootstrap: Bootstrap
) -> Comparison:
    """Compare two methods by the metric's headline, question by question; `p` is a sign test.

    Raises:
        DataError: they were not asked the same questions.
    """
    name = HEADLINE[metric]
    mine, theirs = ({row.id: row.scores[name] for row in found} for found in (rows, against))
    if mine.keys() != theirs.keys():
        only = sorted(mine.keys() ^ theirs.keys())
        raise DataError(
            f"{len(only)} questions were asked of one method only, the first is {only[0]!r}; compare methods on the "
            "same questions"
        )
    differences = [mine[id] - theirs[id] for id in mine]
    low, high = bootstrap_interval(differences, bootstrap.resamples, bootstrap.seed, bootstrap.level)
    won, lost = (sum(sign * value > 0 for value in differences) for sign in (1, -1))
    return Comparison(len(differences), _mean(differences), low, high, won, lost, mcnemar(won, lost))


def check_failures(name: str, rows: Sequence[QueryRow], allowed: float) -> None:
    """Refuse figures of which too many are failures.

    Raises:
        RetrieverError: more than the allowed share failed; tells the most frequent cause.
    """
    failed = Counter(row.failed for row in rows if row.failed)
    if failed.total() > allowed * len(rows):
        cause, times = failed.most_common(1)[0]
        raise RetrieverError(
            f"{name}: {failed.total()} of {len(rows)} questions failed, above max_failed_fraction={allowed:g}; most "
            f"frequent cause ({times} times): {cause}"
        )


def _of_source(rows: Sequence[QueryRow], metric: Metric) -> dict[str, Any]:
    scores = _means([row.scores for row in rows])
    found: dict[str, Any] = {"n": len(rows), "scores": scores}
    found["accuracy"] = scores[HEADLINE[metric]] if metric == "execution" else None
    return found | {"recall": scores[HEADLINE[metric]] if metric == "recall" else None}


def _by_source(rows: Sequence[QueryRow]) -> dict[str, list[QueryRow]]:
    groups: dict[str, list[QueryRow]] = {}
    for row in rows:
        groups.setdefault(row.source, []).append(row)
    return dict(sorted(groups.items()))


def _means(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: _mean([found[name] for found in scores]) for name in (scores[0] if scores else ())}


def _intervals(scores: Sequence[Mapping[str, float]], bootstrap: Bootstrap) -> dict[str, list[float]]:
    return {
        name: list(bootstrap_interval([s[name] for s in scores], bootstrap.resamples, bootstrap.seed, bootstrap.level))
        for name in scores[0]
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
