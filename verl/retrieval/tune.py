"""How much of an index a search must look at: recall against exact search, and queries per second, measured."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np

from verl.errors import ConfigError, DataError
from verl.retrieval.corpus import Corpus
from verl.retrieval.dense import open_file, open_source
from verl.retrieval.dense_search import Hits, ListSource, Source, flat_vectors, nearest, pair_scores
from verl.retrieval.engine import IndexInfo
from verl.retrieval.exact import ExactSearch
from verl.retrieval.search_config import DEFAULT_EF_SEARCH, Tuning

logger = logging.getLogger(__name__)

_BATCH = 64
_TITLE_WORDS = 12
_EQUAL = 1e-6
"""Scores this near are one score: a document that is as good as the last true one counts as found."""


@dataclass(frozen=True, slots=True)
class TuneConfig:
    """What is asked of the search.

    Attributes:
        target_recall: share of the true best `k` documents that must be found.
        sample: how many queries it is measured with, where they are drawn from the corpus.
        seed: of that draw.
    """

    target_recall: float = 0.95
    k: int = 10
    sample: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.target_recall <= 1:
            raise ConfigError(f"target_recall={self.target_recall}; expected above 0 and at most 1")
        for name in ("k", "sample"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; expected at least 1")


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one value of the parameter achieves."""

    value: int
    recall: float
    queries_per_s: float


@dataclass(frozen=True, slots=True)
class Sweep:
    """All that was measured.

    Attributes:
        parameter: `nprobe`, `ef_search`, or empty where a kind has neither; its one value is then 0.
        exact: what exact search went over: the `vectors` of the encoder, or the `codes` of the index.
        exact_queries_per_s: the speed of exact search.
        measurements: by rising value.
        chosen: the smallest value that reaches the target, None if none does.
    """

    parameter: str
    exact: str
    exact_queries_per_s: float
    measurements: tuple[Measurement, ...]
    chosen: Measurement | None


@dataclass(frozen=True, slots=True)
class Truth:
    """The result of exact search.

    Attributes:
        worst: (Q,) float32, the score of every query's `k`-th best document.
        scores: returns the true scores of a query's hits, (n,) float32.
    """

    exact: str
    worst: np.ndarray
    scores: Callable[[Hits, np.ndarray], np.ndarray]
    queries_per_s: float


def tune(folder: Path, corpus: Corpus, queries: np.ndarray, vectors: np.ndarray | None, config: TuneConfig) -> Sweep:
    """Measure the index in `folder` and write the parameter that reaches the target beside it, as `tune.json`.

    Args:
        queries: (Q, D) float32
        vectors: (N, D), what the encoder made of the corpus; the index's own codes stand for them when None, and then
            what the codes lose is not measured.

    Raises:
        DataError: no value reaches the target; nothing is written then.
    """
    index, info = open_file(folder, corpus, IndexInfo.load(folder))
    ((name, mark),) = info.files.items()
    found = sweep(index, queries, vectors, config)
    if found.chosen is None:
        best = max(found.measurements, key=lambda item: item.recall)
        raise DataError(
            f"index {folder / name} is not tuned: recall@{config.k} is {best.recall:.3f} at best "
            f"({found.parameter or 'all of it'}={best.value}), {config.target_recall} was asked for; pass a lower "
            "--target_recall, or build a kind with larger codes"
        )
    if found.parameter:
        chosen = found.chosen
        logger.info("%s: %s=%d has recall@%d %.3f", name, found.parameter, chosen.value, config.k, chosen.recall)
        Tuning(
            index=mark,
            parameter=found.parameter,
            value=chosen.value,
            k=config.k,
            recall=chosen.recall,
            target_recall=config.target_recall,
            queries=len(queries),
            queries_per_s=chosen.queries_per_s,
            exact=found.exact,
        ).save(folder)
    return found


def sweep(index: faiss.Index, queries: np.ndarray, vectors: np.ndarray | None, config: TuneConfig) -> Sweep:
    """Try rising values of the index's parameter until the target is reached, then look for the smallest that does."""
    k = min(config.k, index.ntotal)
    truth = exact_results(index, queries, vectors, k)
    name, lowest, highest = _range(index)
    tried: dict[int, Measurement] = {}

    def reaches(value: int) -> bool:
        source = open_source(index, {name: value} if name else {})
        tried[value] = measure(source, queries, truth, k, value)
        source.close()
        return tried[value].recall >= config.target_recall

    low, high = 0, lowest
    while not reaches(high) and high < highest:
        low, high = high, min(2 * high, highest)
    while low and tried[high].recall >= config.target_recall and high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    enough = [item for item in tried.values() if item.recall >= config.target_recall]
    chosen = min(enough, key=lambda item: item.value, default=None)
    ordered = tuple(tried[value] for value in sorted(tried))
    return Sweep(name, truth.exact, truth.queries_per_s, ordered, chosen)


def _range(index: faiss.Index) -> tuple[str, int, int]:
    """Return the parameter of an index with its lowest and highest value."""
    if isinstance(index, faiss.IndexIVF):
        return "nprobe", 1, index.nlist
    if isinstance(index, faiss.IndexHNSW):
        # Less than the default saves little, and would bound `topk`.
        return "ef_search", min(DEFAULT_EF_SEARCH, index.ntotal), min(4096, index.ntotal)
    return "", 0, 0


def exact_results(index: faiss.Index, queries: np.ndarray, vectors: np.ndarray | None, k: int) -> Truth:
    """Search exactly: through `vectors`, else through what the index holds, which are vectors or only codes."""
    start = time.perf_counter()
    if vectors is None and isinstance(index, faiss.IndexHNSW):
        vectors = flat_vectors(faiss.downcast_index(index.storage))
    if vectors is None and isinstance(index, faiss.IndexFlat):
        vectors = flat_vectors(index)
    if vectors is not None:
        search = ExactSearch(vectors)
        rows, _ = search.search(queries, k)
        search.close()
        found = [Hits(row, pair_scores(vectors[row], query)) for row, query in zip(rows, queries, strict=True)]
    else:
        source = ListSource(index, index.nlist) if isinstance(index, faiss.IndexIVF) else open_source(index, {})
        found = nearest(source, queries, k)
    rate = len(queries) / (time.perf_counter() - start)
    worst = np.array([np.partition(hits.scores, -k)[-k] for hits in found], dtype=np.float32)
    known = vectors

    def scores(hits: Hits, query: np.ndarray) -> np.ndarray:
        return hits.scores if known is None else pair_scores(known[hits.rows], query)

    whole = known is not None or isinstance(index, faiss.IndexIVFFlat)
    return Truth("vectors" if whole else "codes", worst, scores, rate)


def measure(source: Source, queries: np.ndarray, truth: Truth, k: int, value: int) -> Measurement:
    """Search all queries in batches; returns the recall and the speed."""
    start = time.perf_counter()
    found = [hits for batch in _batches(queries) for hits in nearest(source, batch, min(k, source.most))]
    seconds = time.perf_counter() - start
    good = 0
    for hits, query, worst in zip(found, queries, truth.worst, strict=True):
        best = np.argsort(-hits.scores, kind="stable")[:k]
        scores = truth.scores(Hits(hits.rows[best], hits.scores[best]), query)
        good += int(np.count_nonzero(scores >= worst - _EQUAL * abs(worst)))
    return Measurement(value, good / (k * len(queries)), len(queries) / seconds)


def _batches(queries: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(queries), _BATCH):
        yield queries[start : start + _BATCH]


def sample_queries(corpus: Corpus, count: int, seed: int) -> list[str]:
    """Return the titles of some documents, drawn at random; the first words of one that has none."""
    rows = np.random.default_rng(seed).choice(len(corpus), min(count, len(corpus)), replace=False, shuffle=False)
    documents = (corpus[int(row)] for row in np.sort(rows))
    return [doc.title or " ".join(doc.text.split()[:_TITLE_WORDS]) for doc in documents]


def table(found: Sweep, k: int) -> str:
    """Lay out a sweep for reading, the chosen value marked."""
    lines = [f"{found.parameter or 'search':>10}{f'recall@{k}':>12}{'queries/s':>12}{'x exact':>10}"]
    for item in found.measurements:
        ratio = item.queries_per_s / found.exact_queries_per_s
        mark = "  <- chosen" if item == found.chosen and found.parameter else ""
        lines.append(f"{item.value or '-':>10}{item.recall:>12.4f}{item.queries_per_s:>12.0f}{ratio:>10.2f}{mark}")
    if found.exact == "codes":
        lines.append("recall is among the index's own codes: without the vectors, what the codes lose is not seen")
    return "\n".join(lines)
