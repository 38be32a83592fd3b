"""Figures of policies that answer themselves: their answers, what they retrieved, and whether they searched enough.

Of a question with gold passages G (distinct titles; one a hop) and a trajectory that searched n times:

* `recall_at[k]`: share of G among the k best documents of any of its searches.
* `recall`: share of G among the documents that it was shown.
* under-search: it stopped by itself and G was not yet shown in full.
* over-search: it searched again after all of G had been shown.
* `beyond_hops`: n > |G|; `extra_searches` is the mean of n - |G|.

Rates are over the questions that name gold passages and did not fail. A failed question counts as answered wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verl.evaluation.summary import bootstrap_interval
from verl.rewards.recall import gold_recall, title_key
from verl.rewards.text import exact_match, f1, span_match, strict_match, sub_span_match
from verl.types import Document, Question, Stop, Trajectory

RECALL_AT = (1, 3, 5, 10)
ANSWER_METRICS: Mapping[str, Callable[[str, Sequence[str]], float]] = {
    "accuracy": span_match,
    "em": exact_match,
    "f1": f1,
    "sub_span": sub_span_match,
    "kilt": strict_match,
}
"""`sub_span` is ExSearch's "Acc", `kilt` KILT's own accuracy; definitions in `verl.rewards.text`."""


@dataclass(frozen=True, slots=True)
class OwnAnswer:
    """One question's row.

    Attributes:
        scores: by the names of `ANSWER_METRICS`, in [0, 1].
        recall, recall_at, under, over, beyond, extra: see the module; None where the question names no gold passages
            or failed.
    """

    id: str
    source: str
    kind: str
    answer: str
    scores: Mapping[str, float]
    failed: bool
    searches: int
    documents: int
    recall: float | None = None
    recall_at: Mapping[int, float] | None = None
    under: bool | None = None
    over: bool | None = None
    beyond: bool | None = None
    extra: int | None = None


def answer_scores(answer: str, golds: Sequence[str]) -> dict[str, float]:
    """Compare an answer with the golds in every way."""
    return {name: float(compare(answer, golds)) for name, compare in ANSWER_METRICS.items()}


def own_answer(trajectory: Trajectory) -> OwnAnswer:
    """Judge one trajectory by its own answer; none at all is an empty one."""
    question, failed = trajectory.question, trajectory.stop is Stop.FAILED
    answer = "" if failed else trajectory.answer or ""
    base = OwnAnswer(
        id=question.id,
        source=question.source,
        kind=question.kind,
        answer=answer,
        scores=answer_scores(answer, question.answers),
        failed=failed,
        searches=trajectory.searches,
        documents=len(trajectory.documents),
    )
    return base if failed or not question.gold_titles else _with_search(base, trajectory)


def _with_search(row: OwnAnswer, trajectory: Trajectory) -> OwnAnswer:
    question = trajectory.question
    hops = len({title_key(title) for title in question.gold_titles})
    shown = {title_key(document.title) for document in trajectory.documents}
    after = searches_after_all_gold(trajectory)
    whole = gold_recall(question, trajectory.documents)
    return OwnAnswer(
        **{name: getattr(row, name) for name in _BASE},
        recall=whole,
        recall_at={k: retrieved_recall(trajectory, k) for k in RECALL_AT},
        under=stopped_by_itself(trajectory) and not _gold(question) <= shown,
        over=after is not None and after > 0,
        beyond=trajectory.searches > hops,
        extra=trajectory.searches - hops,
    )


_BASE = ("id", "source", "kind", "answer", "scores", "failed", "searches", "documents")


def retrieved_recall(trajectory: Trajectory, k: int) -> float:
    """Return the share of the gold titles among the `k` best documents of all searches together."""
    best = [doc for turn in trajectory.turns if turn.result is not None for doc in turn.result.documents[:k]]
    return gold_recall(trajectory.question, best) or 0.0


def searches_after_all_gold(trajectory: Trajectory) -> int | None:
    """Return how many searches followed the one that completed the gold passages; None if none did.

    Only documents that the policy was shown count (`Trajectory.documents`).
    """
    shown = {_identity(document) for document in trajectory.documents}
    missing = set(_gold(trajectory.question))
    results = [turn.result for turn in trajectory.turns if turn.result is not None]
    for number, result in enumerate(results, start=1):
        missing -= {title_key(doc.title) for doc in result.documents if _identity(doc) in shown}
        if not missing:
            return len(results) - number
    return None


def stopped_by_itself(trajectory: Trajectory) -> bool:
    """Whether the policy ended its search, and not the limit of turns or of the context."""
    if trajectory.stop is not Stop.FINISHED:
        return False
    # The last turn is the answer where it was asked for; before it stands the one that ended the search.
    last = trajectory.turns[-2] if trajectory.answer is not None and len(trajectory.turns) > 1 else trajectory.turns[-1]
    return last.query is None and not last.invalid


def figures(rows: Sequence[OwnAnswer], seconds: float, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Return what `verl.evaluation.report.write_report` takes of a method, with the figures of this module.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("got no rows; expected at least one question")
    accuracy = [row.scores["accuracy"] for row in rows]
    low, high = bootstrap_interval(accuracy, resamples, seed)
    judged = [row for row in rows if row.recall is not None]
    by_source = _by(rows, lambda row: row.source)
    means = {source: _answer_means(own) | {"n": len(own)} for source, own in by_source}
    found: dict[str, Any] = _answer_means(rows)
    found |= {
        "accuracy_interval": [low, high],
        "accuracy_by_kind": {k: _mean(r.scores["accuracy"] for r in own) for k, own in _by(rows, lambda row: row.kind)},
        "by_source": means,
        "macro_accuracy": _mean(row["accuracy"] for row in means.values()),
        "own_em": _mean(row["em"] for row in means.values()),
        "n": len(rows),
        "failed": sum(row.failed for row in rows),
        "documents": _mean(row.documents for row in rows),
        "searches": _mean(row.searches for row in rows),
        "seconds": seconds,
        "recall": _mean(row.recall for row in judged) if judged else None,
    }
    return found | (_search_figures(judged) if judged else {})


def _answer_means(rows: Sequence[OwnAnswer]) -> dict[str, Any]:
    return {name: _mean(row.scores[name] for row in rows) for name in ANSWER_METRICS}


def _search_figures(rows: Sequence[OwnAnswer]) -> dict[str, Any]:
    return {
        "recall_at": {str(k): _mean(row.recall_at[k] for row in rows if row.recall_at) for k in RECALL_AT},
        "under_search": _mean(float(bool(row.under)) for row in rows),
        "over_search": _mean(float(bool(row.over)) for row in rows),
        "beyond_hops": _mean(float(bool(row.beyond)) for row in rows),
        "extra_searches": _mean(float(row.extra or 0) for row in rows),
    }


def _by(rows: Sequence[OwnAnswer], key: Callable[[OwnAnswer], str]) -> list[tuple[str, list[OwnAnswer]]]:
    groups: dict[str, list[OwnAnswer]] = {}
    for row in rows:
        if key(row):
            groups.setdefault(key(row), []).append(row)
    return sorted(groups.items())


def _gold(question: Question) -> set[str]:
    return {title_key(title) for title in question.gold_titles}


def _identity(document: Document) -> tuple[str, str]:
    return document.title, document.text


def _mean(values: Iterable[Any]) -> float:
    listed = [float(value) for value in values]
    return sum(listed) / len(listed) if listed else 0.0
