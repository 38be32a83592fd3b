"""What trec_eval says about a run, per query and on average, with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytrec_eval

from verl.errors import DataError
from verl.retrieval.trec import Qrels, Run


@dataclass(frozen=True, slots=True)
class Measure:
    """A measure by trec_eval.

    Attributes:
        key: trec_eval's name of it.
        cutoff: how many documents of a query it looks at; None for all.
    """

    key: str
    cutoff: int | None


_RECIPROCAL_RANK = "recip_rank"

MEASURES: Mapping[str, Measure] = {
    "ndcg@10": Measure("ndcg_cut_10", 10),
    "recall@5": Measure("recall_5", 5),
    "recall@10": Measure("recall_10", 10),
    "recall@20": Measure("recall_20", 20),
    "recall@100": Measure("recall_100", 100),
    "mrr@10": Measure(_RECIPROCAL_RANK, 10),
    "map": Measure("map", None),
}


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """How the interval is found: percentiles of the mean over queries drawn with replacement (Efron 1979).

    Attributes:
        resamples: how often the queries are drawn.
        level: share of the means inside the interval.
        seed: of the drawing.
    """

    resamples: int = 2000
    level: float = 0.95
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over queries and its interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Scores:
    """What a run earned.

    Attributes:
        estimates: by measure.
        per_query: value by measure, by query; every query with a relevant document is in it.
        without_hits: how many of these queries the run holds no document for; they count as 0.
        without_relevant: how many judged queries have no relevant document; no measure is defined for them, so they
            are left out.
    """

    estimates: Mapping[str, Estimate]
    per_query: Mapping[str, Mapping[str, float]]
    without_hits: int
    without_relevant: int


def score_run(
    run: Run, qrels: Qrels, measures: Sequence[str] = tuple(MEASURES), bootstrap: Bootstrap | None = None
) -> Scores:
    """Score a run against judgements; queries of the run without judgement are left out.

    Raises:
        DataError: no judged query has a relevant document.
    """
    judged = {query: dict(grades) for query, grades in qrels.items() if any(grade > 0 for grade in grades.values())}
    if not judged:
        raise DataError("the qrels hold no relevant document; expected a grade above 0")
    keys = {MEASURES[name].key for name in measures}
    hits = {query: dict(run[query]) for query in judged if run.get(query)}
    # pytrec_eval leaves out the queries that the run does not hold, which would raise the mean.
    found = pytrec_eval.RelevanceEvaluator(judged, keys).evaluate(hits)
    nothing = dict.fromkeys(keys, 0.0)
    per_query = {
        query: {name: _value(MEASURES[name], found.get(query, nothing)) for name in measures} for query in judged
    }
    estimates = _estimates(per_query, measures, bootstrap or Bootstrap())
    return Scores(estimates, per_query, len(judged) - len(hits), len(qrels) - len(judged))


def _value(measure: Measure, values: Mapping[str, float]) -> float:
    """Read one value; trec_eval has no cutoff for the reciprocal rank, whose values are 1, 1/2, 1/3 and so on."""
    value = values[measure.key]
    if measure.key == _RECIPROCAL_RANK and measure.cutoff is not None and value * (measure.cutoff + 0.5) < 1:
        return 0.0
    return value


def _estimates(
    per_query: Mapping[str, Mapping[str, float]], measures: Sequence[str], bootstrap: Bootstrap
) -> dict[str, Estimate]:
    values = np.array([[row[name] for name in measures] for row in per_query.values()])
    rng = np.random.default_rng(bootstrap.seed)
    means = np.array(
        [values[rng.integers(len(values), size=len(values))].mean(axis=0) for _ in range(bootstrap.resamples)]
    )
    tail = 50 * (1 - bootstrap.level)
    low, high = np.percentile(means, [tail, 100 - tail], axis=0)
    columns = zip(measures, values.mean(axis=0), low, high, strict=True)
    return {name: Estimate(float(mean), float(least), float(most)) for name, mean, least, most in columns}
