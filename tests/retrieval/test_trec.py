from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.errors import DataError
from verl.retrieval.trec import ranking, read_qrels, read_run, write_run


@pytest.mark.parametrize(
    "text",
    [
        "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td 2\t0\nq2\td1\t2\n",
        "q1\td1\t1\r\nq1\td 2\t0\r\n\r\nq2\td1\t+2\r\n",
        "q1\t0\td1\t1\nq1\t0\td 2\t0\nq2\t0\td1\t2\n",
    ],
)
def test_qrels_of_both_formats_are_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "qrels"
    expected = {"q1": {"d1": 1, "d 2": 0}, "q2": {"d1": 2}}
    path.write_bytes(text.encode())
    assert read_qrels(path) == expected
    path.write_bytes(gzip.compress(text.encode()))
    assert read_qrels(path) == expected


def test_qrels_with_blanks_and_negative_grades_are_read(tmp_path: Path) -> None:
    path = tmp_path / "qrels"
    path.write_text("301 0 FBIS3-1 -1\n301  Q0\tFBIS3-2 1\n")
    assert read_qrels(path) == {"301": {"FBIS3-1": -1, "FBIS3-2": 1}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q1 d1\n", "line 1: 'q1 d1'; expected query, iteration, document and grade"),
        ("q1\td1\t1\nq1\td2\thigh\n", "line 2: grade 'high'; expected an integer"),
        ("q1\td1\t1\nq1\td1\t2\n", "line 2: document 'd1' of query 'q1' has grade 2 here and 1 before"),
        ("query-id\tcorpus-id\tscore\n", "holds no judgement"),
        ("q1\td1\t1\n\udcff", "line 2: not UTF-8 at byte 0"),
    ],
)
def test_bad_qrels_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "qrels"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError) as caught:
        read_qrels(path)
    assert str(path) in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q Q0 d 1 0.5\n", "line 1: 5 columns; expected six"),
        ("q Q0 d 1 high tag\n", "line 1: score 'high'; expected a finite number"),
        ("q Q0 d 1 nan tag\n", "line 1: score 'nan'"),
        ("q Q0 d 1 2 tag\nq Q0 d 2 1 tag\n", "line 2: document 'd' comes twice for query 'q'"),
        ("\n", "holds no result"),
    ],
)
def test_a_bad_run_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_run(path)
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for read in (read_run, read_qrels):
        with pytest.raises(DataError, match="nowhere cannot be read"):
            read(tmp_path / "nowhere")


def test_a_run_is_written_best_first_and_read_back(tmp_path: Path) -> None:
    run = {"q1": ranking(["b", "a", "c"], [2.0, 2.0, 0.125]), "q2": {}, "q3": ranking(["a"], [-1.5])}
    write_run(tmp_path / "run", run, "tag")
    lines = (tmp_path / "run").read_text().splitlines()
    assert lines == ["q1 Q0 b 1 2.0 tag", "q1 Q0 a 2 1.9999999 tag", "q1 Q0 c 3 0.125 tag", "q3 Q0 a 1 -1.5 tag"]
    read = read_run(tmp_path / "run")
    assert read.keys() == {"q1", "q3"}
    for query, scores in read.items():
        assert {id: np.float32(score) for id, score in scores.items()} == run[query]


@pytest.mark.parametrize("id", ["a b", "", "a\n", "\ta", "a\u00a0b"])
def test_an_id_that_no_run_can_hold_is_refused(tmp_path: Path, id: str) -> None:
    with pytest.raises(DataError, match="is empty or holds white space"):
        write_run(tmp_path / "run", {"q": {id: 1.0}}, "tag")


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=30), st.integers(0, 5))
def test_scores_fall_strictly_in_the_order_given_and_are_kept_where_they_can(scores: list[float], ties: int) -> None:
    scores = sorted(scores + scores[:ties], reverse=True)
    ids = [str(n) for n in range(len(scores))]
    ranked = ranking(ids, scores)
    values = np.array(list(ranked.values()), dtype=np.float32)
    assert list(ranked) == ids and values.tolist() == list(ranked.values())
    assert np.all(values[1:] < values[:-1])
    if len(set(np.float32(scores).tolist())) == len(scores):
        assert values.tolist() == np.float32(scores).tolist()


def test_a_document_that_comes_twice_keeps_its_first_place() -> None:
    assert list(ranking(["a", "b", "a"], [3.0, 2.0, 1.0])) == ["a", "b"]
