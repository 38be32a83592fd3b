"""The compiled search against adding up whole arrays, whatever it skips on the way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.retrieval import bm25_search
from verl.retrieval.bm25_search import Postings

DOCUMENTS = 9000


def index_of(lists: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    starts = np.cumsum([0, *(len(rows) for rows, _ in lists)])
    return starts, np.concatenate([rows for rows, _ in lists]), np.concatenate([scores for _, scores in lists])


def random_lists(seed: int, rounded: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """Terms that are in 1 to all of the documents; the rarer, the more they count, as in BM25."""
    rng, lists = np.random.default_rng(seed), []
    for count in (1, 4, 12, 30, 80, 400, 1500, 5000, DOCUMENTS):
        rows = np.sort(rng.choice(DOCUMENTS, count, replace=False)).astype(np.int32)
        weight = np.log(1 + (DOCUMENTS - count + 0.5) / (count + 0.5))
        shares = rng.integers(1, 3, count) / 2 if rounded else rng.uniform(0.2, 0.9, count)
        lists.append((rows, (weight * shares).astype(np.float32)))
    return lists


def brute_force(lists: Sequence[tuple[np.ndarray, np.ndarray]], terms: Sequence[int], topk: int) -> dict[int, float]:
    totals = np.zeros(DOCUMENTS, np.float32)
    for term in terms:
        rows, scores = lists[term]
        totals[rows] += scores
    ranked = sorted((score for score in totals.tolist() if score > 0), reverse=True)
    floor = ranked[:topk][-1] if ranked else 0.0
    return {row: score for row, score in enumerate(totals.tolist()) if score > 0 and score >= floor}


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 20),
    st.booleans(),
    st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=10), min_size=1, max_size=4),
    st.sampled_from([1, 2, 8, 50, 1000, DOCUMENTS]),
)
def test_results_are_those_of_adding_up_every_list(seed: int, rounded: bool, asked: list[list[int]], topk: int) -> None:
    lists = random_lists(seed, rounded)
    for number in (DOCUMENTS, 500):
        lists = [cut_off(entries, number) for entries in lists]
        check(lists, number, asked, min(topk, number))


def cut_off(entries: tuple[np.ndarray, np.ndarray], documents: int) -> tuple[np.ndarray, np.ndarray]:
    kept = entries[0] < documents
    return entries[0][kept], entries[1][kept]


def check(lists: Sequence[tuple[np.ndarray, np.ndarray]], documents: int, asked: list[list[int]], topk: int) -> None:
    postings = Postings(*index_of(lists), documents)
    for terms in asked:  # one after the other: a search leaves nothing behind
        rows, scores = postings.best(terms, topk)
        assert len(set(rows.tolist())) == len(rows)
        assert dict(zip(rows.tolist(), scores.tolist(), strict=True)) == brute_force(lists, terms, topk)


def test_a_long_list_is_looked_into_and_not_added_up() -> None:
    rare = (np.array([5, 9], np.int32), np.array([8.0, 7.0], np.float32))
    common = (np.arange(DOCUMENTS, dtype=np.int32), np.full(DOCUMENTS, 0.5, np.float32))
    starts, rows, scores = index_of([rare, common])
    postings = Postings(starts, rows, scores, DOCUMENTS)
    assert dict(zip(*map(np.ndarray.tolist, postings.best([1, 0], 2)), strict=True)) == {5: 8.5, 9: 7.5}
    # Once its highest score is known, only the entries of documents 5 and 9 count. A changed one shows who reads it.
    scores[2 + 100] = 100.0
    assert set(postings.best([0, 1], 2)[0].tolist()) == {5, 9}
    assert 100 in postings.best([0, 1], 3)[0].tolist(), "the rare list alone has too few"


def test_no_list_and_no_entry_is_no_hit() -> None:
    postings = Postings(*index_of([(np.zeros(0, np.int32), np.zeros(0, np.float32))]), 3)
    for terms in ([], [0], [0, 0]):
        rows, scores = postings.best(terms, 2)
        assert (rows.tolist(), scores.tolist()) == ([], [])


@pytest.mark.parametrize(
    ("topk", "found"), [(1, [3]), (2, [1, 3, 4]), (3, [1, 3, 4]), (4, [1, 2, 3, 4]), (9, [1, 2, 3, 4])]
)
def test_ties_at_the_floor_are_kept(topk: int, found: list[int]) -> None:
    entries = (np.array([1, 2, 3, 4], np.int32), np.array([1.0, 0.5, 2.0, 1.0], np.float32))
    rows, _ = Postings(*index_of([entries]), 6).best([0], topk)
    assert sorted(rows.tolist()) == found


def test_what_was_compiled_need_not_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def njit(cache: bool = False, **options: bool):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: (function, options)

    monkeypatch.setattr(bm25_search, "njit", njit)
    assert bm25_search._compiled(len) == (len, {"nogil": True})
