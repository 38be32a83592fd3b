"""Rows of documents by id, against the corpus itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.retrieval.support import open_corpus
from verl.errors import DataError
from verl.retrieval.corpus import Corpus
from verl.retrieval.lucene_rows import RowFinder


def corpus_of(folder: Path, ids: list[str]) -> Corpus:
    return open_corpus(folder, [(id, "title", f"text of {id}") for id in ids])


def found(finder: RowFinder, ids: list[str]) -> list[str]:
    return [document.text.removeprefix("text of ") for document in finder.documents(ids)]


def test_ids_that_are_row_numbers_need_no_table(tmp_path: Path) -> None:
    finder = RowFinder(corpus_of(tmp_path, [str(row) for row in range(20)]), tmp_path / "table")
    assert found(finder, ["7", "0", "19", "7"]) == ["7", "0", "19", "7"]
    assert found(finder, []) == []
    assert not (tmp_path / "table").exists()


@pytest.mark.parametrize(
    "ids",
    [
        [f"doc-{row}" for row in range(200)],
        [str(row) for row in reversed(range(200))],
        ["é", "日本", "1", "01", "²", "-1", " 1", "9" * 30, "a" * 300],
    ],
)
def test_other_ids_are_found_by_a_table_that_is_kept(tmp_path: Path, ids: list[str]) -> None:
    corpus = corpus_of(tmp_path, ids)
    documents = list(corpus.documents())
    backwards = [document.id for document in reversed(documents)]
    assert RowFinder(corpus, tmp_path).documents(backwards) == documents[::-1]
    (table,) = tmp_path.glob("rows-*.npy")
    written = table.stat().st_mtime_ns
    assert RowFinder(corpus, tmp_path).documents(backwards) == documents[::-1]
    assert table.stat().st_mtime_ns == written
    table.write_bytes(table.read_bytes()[:100])
    assert RowFinder(corpus, tmp_path).documents(backwards) == documents[::-1]


def test_without_a_place_for_the_table_it_stays_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    finder = RowFinder(corpus_of(tmp_path, ["x", "y"]), tmp_path / "missing")
    assert found(finder, ["y", "x"]) == ["y", "x"]
    assert "the ids are sorted again at every start" in caplog.text


@pytest.mark.parametrize("ids", [["0", "1"], ["x", "y"]])
@pytest.mark.parametrize("unknown", ["2", "z", "-1", "00", "18446744073709551616", ""])
def test_an_unknown_id_is_an_error(tmp_path: Path, ids: list[str], unknown: str) -> None:
    finder = RowFinder(corpus_of(tmp_path, ids), tmp_path)
    with pytest.raises(DataError, match=rf"holds document '{unknown}', which corpus .* lacks"):
        finder.documents([ids[0], unknown])
