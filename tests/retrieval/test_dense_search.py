"""Search over every kind of index: results that depend on the query alone, and equal scores complete."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from verl.retrieval.dense import open_source
from verl.retrieval.dense_search import (
    Candidates,
    GpuSource,
    Hits,
    ListSource,
    Source,
    nearest,
    pair_scores,
    stored_vector,
)
from verl.retrieval.index_file import read_index_file, write_index_file
from verl.retrieval.index_kinds import EXACT_KINDS, KINDS, IndexConfig, lay_out

ROWS, WIDTH = 3000, 24
TWINS = slice(100, 160)
"""Rows with one vector: more than a search of 10 asks for at first."""

Open = Callable[..., Source]


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((60, WIDTH))
    made = centres[rng.integers(0, 60, ROWS)] + 0.5 * rng.standard_normal((ROWS, WIDTH))
    made = (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)
    made[rng.integers(0, ROWS, 500)] = made[rng.integers(0, ROWS, 500)]  # pairs all over
    made[TWINS] = made[7]
    return made


@pytest.fixture(scope="module")
def queries(vectors: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(1)
    asked = vectors[rng.integers(0, ROWS, 64)] + 0.1 * rng.standard_normal((64, WIDTH)).astype(np.float32)
    asked[5] = vectors[7]
    asked[6] = 0
    return asked


@pytest.fixture(scope="module")
def indexes(vectors: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("indexes")
    for kind in KINDS:
        config = IndexConfig(kind, hnsw_m=16, ef_construction=60)
        write_index_file(lay_out(config, ROWS, WIDTH), vectors, folder / kind)
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture
def open_kind(indexes: dict[str, Path]) -> Iterator[Open]:
    opened: list[Source] = []

    def open_it(kind: str, **parameters: int) -> Source:
        defaults = {"HNSW": {"ef_search": 128}} | {k: {"nprobe": 8} for k in KINDS if k.startswith("IVF")}
        opened.append(open_source(read_index_file(indexes[kind]), parameters or defaults.get(kind, {})))
        return opened[-1]

    yield open_it
    for source in opened:
        source.close()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = faiss.omp_get_max_threads(), torch.get_num_threads()
    faiss.omp_set_num_threads(2)
    torch.set_num_threads(2)
    yield
    faiss.omp_set_num_threads(before[0])
    torch.set_num_threads(before[1])


def head(hits: Hits, topk: int) -> list[tuple[float, int]]:
    """What a reader sees: by score, equal scores by row."""
    return sorted(zip((-hits.scores).tolist(), hits.rows.tolist(), strict=True))[:topk]


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_alone_and_in_any_batch_has_the_same_result_to_the_last_bit(
    open_kind: Open, queries: np.ndarray, kind: str
) -> None:
    source = open_kind(kind)
    together = [head(hits, 10) for hits in nearest(source, queries, 10)]
    for size in (1, 7, 19, 20):
        split = [hits for at in range(0, 64, size) for hits in nearest(source, queries[at : at + size], 10)]
        assert [head(hits, 10) for hits in split] == together
    backwards = nearest(source, queries[::-1].copy(), 10)[::-1]
    assert [head(hits, 10) for hits in backwards] == together


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("two_threads")
def test_the_number_of_threads_does_not_show(open_kind: Open, queries: np.ndarray, kind: str) -> None:
    two = [head(hits, 10) for hits in nearest(open_kind(kind), queries, 10)]
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    one = [head(hits, 10) for hits in nearest(open_kind(kind), queries, 10)]
    assert one == two


@pytest.mark.parametrize("kind", EXACT_KINDS)
def test_exact_kinds_return_the_best_of_all_decoded_vectors(
    open_kind: Open, indexes: dict[str, Path], queries: np.ndarray, kind: str
) -> None:
    held = read_index_file(indexes[kind]).reconstruct_n(0, ROWS).astype(np.float64)
    found = nearest(open_kind(kind), queries, 10)
    for hits, query in zip(found, queries, strict=True):
        truth = (held * query).sum(axis=1).astype(np.float32)
        everything = Hits(np.arange(ROWS), truth)
        assert head(hits, 10) == head(everything, 10)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "HNSW"])  # a graph promises nothing
def test_more_equal_documents_than_asked_for_are_all_found(open_kind: Open, queries: np.ndarray, kind: str) -> None:
    (hits,) = nearest(open_kind(kind), queries[5:6], 10)
    twins = [7, *range(TWINS.start, TWINS.stop)]
    rows = [row for _, row in head(hits, 10)]
    assert rows == twins[:10], "all have the best score, so the lowest rows must come first"
    assert len(set(hits.scores[np.isin(hits.rows, twins)].tolist())) == 1


def test_documents_that_are_all_equal_are_searched_to_the_end(tmp_path: Path) -> None:
    same = np.full((700, 8), 0.5, np.float32)
    for kind in ("Flat", "SQ8", "IVF-SQ8"):
        write_index_file(lay_out(IndexConfig(kind, nlist=1 if "IVF" in kind else None), 700, 8), same, tmp_path / kind)
        source = open_source(read_index_file(tmp_path / kind), {"nprobe": 1} if "IVF" in kind else {})
        (hits,) = nearest(source, same[:1], 3)
        source.close()
        assert sorted(hits.rows.tolist()) == list(range(700))


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_documents_are_the_head_of_more(open_kind: Open, queries: np.ndarray, kind: str) -> None:
    source = open_kind(kind)
    full = [head(hits, 100) for hits in nearest(source, queries[:8], 100)]
    for topk in (1, 9, 60):
        found = nearest(source, queries[:8], topk)
        assert [head(hits, topk) for hits in found] == [hits[:topk] for hits in full]


def test_clusters_with_too_few_documents_give_fewer_and_no_strangers(open_kind: Open, queries: np.ndarray) -> None:
    source = open_kind("IVF-Flat", nprobe=1)
    sizes = [len(hits.rows) for hits in nearest(source, queries, 1000)]
    assert max(sizes) < 1000 and min(sizes) > 0
    for hits in nearest(source, queries, 1000):
        assert hits.rows.min() >= 0 and np.isfinite(hits.scores).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rough_scores_stay_within_their_bound(open_kind: Open, queries: np.ndarray, kind: str) -> None:
    source = open_kind(kind)
    start = 0
    for part in source.candidates(queries, 50):
        for at in range(len(part.rows)):
            there = part.rows[at] >= 0
            vectors = part.vectors(at, slice(None))[there]
            query = queries[start + at]
            lengths = np.linalg.norm(query) * np.linalg.norm(vectors, axis=1).max()
            difference = np.abs(part.scores[at][there] - pair_scores(vectors, query)).max()
            assert difference <= source.error * lengths
        start += len(part.rows)
    assert start == len(queries)


@pytest.mark.parametrize("kind", ["Flat", "IVF-Flat", "IVF-SQ8", "IVF-PQ"])
def test_candidates_of_a_copy_are_scored_by_the_vectors_of_the_index(
    indexes: dict[str, Path], open_kind: Open, queries: np.ndarray, kind: str
) -> None:
    """The copy is one on the CPU here; `tests/gpu` has those on GPUs."""
    index, copy = read_index_file(indexes[kind]), read_index_file(indexes[kind])
    if kind != "Flat":
        index.nprobe = copy.nprobe = 8
    on_copy = [head(hits, 10) for hits in nearest(GpuSource(index, copy), queries, 10)]
    assert on_copy == [head(hits, 10) for hits in nearest(open_kind(kind), queries, 10)]


class NoisySource:
    """Proposes candidates by scores that are wrong by up to `error`, in an order that depends on the call."""

    error = 0.05

    def __init__(self, vectors: np.ndarray) -> None:
        self._vectors = vectors
        self.most = len(vectors)
        self.asked: list[int] = []

    def candidates(self, queries: np.ndarray, count: int) -> Iterator[Candidates]:
        self.asked.append(count)
        rng = np.random.default_rng(len(self.asked))
        truth = queries @ self._vectors.T
        rough = (truth + rng.uniform(-0.05, 0.05, truth.shape)).astype(np.float32)
        rows = np.argsort(-rough, axis=1)[:, :count]
        yield Candidates(rows, np.take_along_axis(rough, rows, 1), lambda at, columns: self._vectors[rows[at, columns]])

    def close(self) -> None:
        pass


def test_wrong_proposals_are_widened_until_the_result_is_certain(vectors: np.ndarray, queries: np.ndarray) -> None:
    source = NoisySource(vectors)
    unit = queries[7:20] / np.linalg.norm(queries[7:20], axis=1, keepdims=True)
    for query, hits in zip(unit, nearest(source, unit, 10), strict=True):
        assert head(hits, 10) == head(Hits(np.arange(ROWS), pair_scores(vectors, query)), 10)
    assert source.asked[0] == 30 and source.asked[1:] == [30 * 4**n for n in range(1, len(source.asked))]
    assert len(source.asked) > 1


def test_a_score_is_that_of_its_pair_in_double_precision() -> None:
    vectors = np.array([[1e8, 1.0, -1e8], [1.0, 2.0, 3.0]], np.float32)
    assert pair_scores(vectors, np.ones(3, np.float32)).tolist() == [1.0, 6.0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_stored_vector_of_a_row_is_found(indexes: dict[str, Path], vectors: np.ndarray, kind: str) -> None:
    index = read_index_file(indexes[kind])
    for row in (0, 7, ROWS - 1):
        stored = stored_vector(index, row, vectors[row])
        assert stored is not None and float(stored @ vectors[row]) / np.linalg.norm(stored) > 0.9


def test_a_row_that_is_not_where_it_belongs_is_not_found(indexes: dict[str, Path], vectors: np.ndarray) -> None:
    index = read_index_file(indexes["IVF-Flat"])
    assert index.nlist > 16
    assert stored_vector(index, 0, -vectors[0]) is None


def test_ids_beyond_the_index_are_dropped(vectors: np.ndarray, queries: np.ndarray) -> None:
    index = faiss.index_factory(WIDTH, "IVF4,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    ids = np.arange(ROWS)
    ids[7] = ROWS + 50  # as in a damaged file
    index.add_with_ids(vectors, ids)
    (hits,) = nearest(ListSource(index, 4), queries[5:6], 100)
    assert ROWS + 50 not in hits.rows and len(hits.rows) >= 100
