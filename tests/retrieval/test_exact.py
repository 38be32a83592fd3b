from __future__ import annotations

import numpy as np
import pytest

from verl.retrieval.exact import ExactSearch

ROWS, WIDTH = 40_000, 8


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("count", [1, 10, 300])
@pytest.mark.parametrize("asked", [1, 2, 16, 40])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_best_rows_are_those_of_a_full_sort(vectors: np.ndarray, asked: int, count: int, threads: int) -> None:
    queries = np.random.default_rng(1).standard_normal((asked, WIDTH)).astype(np.float32)
    search = ExactSearch(vectors, threads)
    rows, scores = search.search(queries, count)
    search.close()
    truth = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    assert rows.shape == scores.shape == (asked, count) and rows.dtype == np.int64 and scores.dtype == np.float32
    assert np.array_equal(rows, np.argsort(-truth, axis=1, kind="stable")[:, :count])
    np.testing.assert_allclose(scores, np.take_along_axis(truth, rows, axis=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("asked", [2, 20])
def test_read_only_and_half_precision_vectors_are_searched(vectors: np.ndarray, asked: int) -> None:
    half = vectors.astype(np.float16)
    half.flags.writeable = False
    queries = vectors[:asked]
    search = ExactSearch(half, threads=2)
    rows, _ = search.search(queries, 5)
    search.close()
    truth = queries.astype(np.float64) @ half.T.astype(np.float64)
    assert np.array_equal(rows, np.argsort(-truth, axis=1, kind="stable")[:, :5])


@pytest.mark.parametrize("asked", [1, 2, 20])
def test_vectors_may_begin_at_an_odd_address_as_in_a_mapped_file(vectors: np.ndarray, asked: int) -> None:
    shifted = np.frombuffer(b"." * 45 + vectors.tobytes(), np.float32, offset=45).reshape(vectors.shape)
    assert shifted.ctypes.data % 4 != vectors.ctypes.data % 4
    search = ExactSearch(shifted, threads=2)
    rows, _ = search.search(vectors[:asked], 5)
    search.close()
    truth = vectors[:asked].astype(np.float64) @ vectors.T.astype(np.float64)
    assert np.array_equal(rows, np.argsort(-truth, axis=1, kind="stable")[:, :5])


@pytest.mark.parametrize("asked", [3, 30])
def test_all_rows_can_be_asked_for(asked: int) -> None:
    few = np.arange(10, dtype=np.float32).reshape(5, 2)
    search = ExactSearch(few, threads=8)
    rows, scores = search.search(np.ones((asked, 2), np.float32), 5)
    search.close()
    assert rows.tolist() == [[4, 3, 2, 1, 0]] * asked
    assert scores.tolist() == [[17.0, 13.0, 9.0, 5.0, 1.0]] * asked


def test_no_query_has_no_rows(vectors: np.ndarray) -> None:
    rows, scores = ExactSearch(vectors, threads=2).search(np.empty((0, WIDTH), np.float32), 3)
    assert rows.shape == scores.shape == (0, 3)


@pytest.mark.parametrize(
    ("number", "width", "count"), [(5, WIDTH - 1, 1), (5, WIDTH + 1, 1), (5, WIDTH, 0), (0, WIDTH, 1)]
)
def test_what_cannot_be_searched_is_refused(number: int, width: int, count: int) -> None:
    search = ExactSearch(np.ones((number, WIDTH), np.float32), threads=1)
    with pytest.raises(ValueError, match="expected the same width"):
        search.search(np.ones((2, width), np.float32), count)


def test_a_vector_that_is_no_number_is_never_found(vectors: np.ndarray) -> None:
    broken = vectors[:100].copy()
    broken[7] = np.nan
    rows, scores = ExactSearch(broken, threads=1).search(broken[:1], 100)
    assert sorted(rows[0].tolist()) == sorted({*range(100), -1} - {7})
    assert scores[0, -1] == -np.inf
