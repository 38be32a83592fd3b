"""The order of results, against a plain sort."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.retrieval.support import open_corpus
from verl.retrieval.ranking import best_first

IDS = ["b", "a", "10", "9", "z", "é", "A"]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=7, max_size=7), st.integers(1, 7))
def test_equal_scores_come_in_the_order_of_ids(tmp_path: Path, scores: list[float], topk: int) -> None:
    corpus = open_corpus(tmp_path, [(id, "title", "text") for id in IDS])
    result = best_first(corpus, "q", np.arange(7), np.array(scores, np.float32), topk)
    expected = sorted(zip(IDS, scores, strict=True), key=lambda pair: (-pair[1], pair[0]))[:topk]
    assert list(zip((doc.id for doc in result.documents), result.scores, strict=True)) == expected
