"""The compiled search against adding up whole arrays, whatever it skips on the way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.retrieval.bm25_search import Postings

DOCUMENTS = 80_000
"""More than two windows."""


def index_of(lists: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    starts = np.cumsum([0, *(len(rows) for rows, _ in lists)])
    return starts, np.concatenate([rows for rows, _ in lists]), np.concatenate([scores for _, scores in lists])


def random_lists(seed: int, rounded: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """Terms that are in 1 to all of the documents; the rarer, the more they count, as in BM25."""
    rng, lists = np.random.default_rng(seed), []
    for count in (1, 4, 12, 30, 80, 400, 3000, 40_000, DOCUMENTS):
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
    found = np.flatnonzero(totals)
    floor = np.sort(totals[found])[-topk:].min(initial=np.inf)
    return {int(row): float(totals[row]) for row in found if totals[row] >= floor}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 20),
    st.booleans(),
    st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=10), min_size=1, max_size=4),
    st.sampled_from([1, 2, 8, 50, 1000, DOCUMENTS]),
)
def test_results_are_those_of_adding_up_every_list(seed: int, rounded: bool, asked: list[list[int]], topk: int) -> None:
    lists = random_lists(seed, rounded)
    for number in (DOCUMENTS, 32_768, 500):
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


@pytest.mark.parametrize("step", [1, 7, 30])
def test_every_document_may_be_better_than_those_before(step: int) -> None:
    rows = np.arange(0, DOCUMENTS, step, dtype=np.int32)
    entries = (rows, np.linspace(1, 2, len(rows), dtype=np.float32))
    found, _ = Postings(*index_of([entries]), DOCUMENTS).best([0], 3)
    assert sorted(found.tolist()) == rows[-3:].tolist()


def test_every_document_may_be_as_good_as_the_others() -> None:
    entries = (np.arange(DOCUMENTS, dtype=np.int32), np.ones(DOCUMENTS, np.float32))
    found, scores = Postings(*index_of([entries]), DOCUMENTS).best([0, 0], 3)
    assert found.tolist() == list(range(DOCUMENTS))
    assert set(scores.tolist()) == {2.0}


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


def test_a_damaged_list_is_read_without_harm() -> None:
    rows = np.random.default_rng(0).integers(-(2**31), 2**31, 5000).astype(np.int32)
    postings = Postings(*index_of([(rows, np.ones(5000, np.float32))]), DOCUMENTS)
    postings.best([0], 8)
