from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.retrieval.support import write_jsonl
from verl.errors import DataError
from verl.retrieval.collection import open_beir, open_files, read_queries


def write_beir(folder: Path, splits: tuple[str, ...] = ("train", "test")) -> Path:
    (folder / "qrels").mkdir(parents=True)
    write_jsonl(folder / "queries.jsonl", [{"_id": "q1", "text": " one "}, {"_id": "q2", "text": "two"}])
    for split in splits:
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    return folder


def test_a_beir_folder_is_opened_with_the_queries_of_the_split(tmp_path: Path) -> None:
    collection = open_beir(write_beir(tmp_path / "set"))
    assert collection.name == "set/test"
    assert collection.queries == {"q1": "one"}
    assert collection.qrels == {"q1": {"d1": 1}}
    assert open_beir(tmp_path / "set", "train").name == "set/train"


def test_the_only_split_is_taken_and_another_refused(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "set", ("dev",))
    zipped = folder / "queries.jsonl.gz"
    zipped.write_bytes(gzip.compress((folder / "queries.jsonl").read_bytes()))
    (folder / "queries.jsonl").unlink()
    assert open_beir(folder).name == "set/dev"
    with pytest.raises(DataError, match=r"no qrels/test.tsv \(found dev\); pass one with --split"):
        open_beir(folder, "test")


def test_a_folder_that_is_none_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no qrels/test.tsv \(found none\)"):
        open_beir(tmp_path)


def test_a_judged_query_without_text_is_refused(tmp_path: Path) -> None:
    queries = write_jsonl(tmp_path / "q.jsonl", [{"id": 7, "text": "seven"}])
    (tmp_path / "qrels").write_text("7 0 d 1\n8 0 d 1\n9 0 d 1\n")
    with pytest.raises(DataError, match=r"judges 2 queries that .* does not hold, the first is '8'"):
        open_files(queries, tmp_path / "qrels")


def test_queries_are_read_from_tsv_and_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "queries"
    path.write_text("1\twhat is\tthis\n2\tthat\n")
    assert read_queries(path) == {"1": "what is\tthis", "2": "that"}
    path.write_text('{"_id": 1, "text": "this"}\n{"id": "2", "text": "that", "metadata": {}}\n')
    assert read_queries(path) == {"1": "this", "2": "that"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no tab", "no tab; expected the id, a tab and the text"),
        ("2\t ", "query '2' has the text ''"),
        ("1\tagain", "id '1' comes twice"),
        ("{broken", "not JSON"),
        ('{"_id": 2}', "found _id; expected _id"),
        ('{"_id": true, "text": "x"}', "found _id, text; expected _id"),
        ('{"_id": "2", "text": 5}', "expected _id"),
    ],
)
def test_a_bad_query_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "queries"
    path.write_text(f"{json.dumps({'_id': '1', 'text': 'x'})}\n{line}\n")
    with pytest.raises(DataError) as caught:
        read_queries(path)
    assert f"{path}, line 2: " in str(caught.value) and message in str(caught.value)
