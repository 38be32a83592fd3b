from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from verl.errors import DataError
from verl.retrieval import corpus_store
from verl.retrieval.corpus_store import ArrowStore, StoreWriter
from verl.types import Document

DOCUMENTS = [Document(f"p{n}", f"title {n}", f"text {n} " * (n % 5)) for n in range(10_000)]


def write(path: Path, documents: Iterable[Document] = DOCUMENTS) -> Path:
    with StoreWriter(path) as writer:
        for document in documents:
            writer.add(document)
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("store") / "c.arrow")


def test_rows_and_scans_agree_with_what_was_written(path: Path) -> None:
    store = ArrowStore(path, len(DOCUMENTS))
    assert [store[row] for row in range(len(DOCUMENTS))] == DOCUMENTS
    assert [store.id(row) for row in (0, 4095, 4096, 9999)] == ["p0", "p4095", "p4096", "p9999"]
    for start, stop in ((0, 10_000), (4095, 4097), (4096, 8192), (5000, 5001), (8191, 10_000)):
        assert list(store.scan(start, stop)) == DOCUMENTS[start:stop]


def test_a_file_that_is_none_of_ours_is_refused(path: Path, tmp_path: Path) -> None:
    for documents in (8192, 12_289):
        with pytest.raises(ValueError, match="batches, expected"):
            ArrowStore(path, documents)
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("no arrow" * 100)
    for name in ("empty", "text"):
        with pytest.raises(ValueError, match=r"."):
            ArrowStore(tmp_path / name, 1)


def test_a_scan_of_a_file_that_is_gone_says_so(tmp_path: Path) -> None:
    store = ArrowStore(write(tmp_path / "c.arrow"), len(DOCUMENTS))
    (tmp_path / "c.arrow").unlink()
    assert store[5000] == DOCUMENTS[5000]
    with pytest.raises(DataError, match=r"c.arrow is gone or cannot be read .*; open the corpus again"):
        next(store.scan(0, 1))


def test_opening_reads_the_footer_alone(path: Path, tmp_path: Path) -> None:
    content = bytearray(path.read_bytes())
    third = len(content) // 3
    content[third : 2 * third] = bytes(third)
    (tmp_path / "c.arrow").write_bytes(content)
    store = ArrowStore(tmp_path / "c.arrow", len(DOCUMENTS))
    assert store[0] == DOCUMENTS[0]


def test_giving_pages_back_changes_no_document(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_store, "_MAPPED_BYTES", 0)
    monkeypatch.setattr(corpus_store, "_FETCHES_KEPT", 3)
    store = ArrowStore(path, len(DOCUMENTS))
    rows = random.Random(0).choices(range(len(DOCUMENTS)), k=1000)
    assert [store[row] for row in rows] == [DOCUMENTS[row] for row in rows]
    assert [store.id(row) for row in rows] == [DOCUMENTS[row].id for row in rows]


def test_few_open_batches_change_no_document(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_store, "_OPEN_BATCHES", 1)
    store = ArrowStore(path, len(DOCUMENTS))
    assert [store[row] for row in (0, 5000, 1, 9000, 2)] == [DOCUMENTS[row] for row in (0, 5000, 1, 9000, 2)]


def test_many_threads_read_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_store, "_OPEN_BATCHES", 1)
    monkeypatch.setattr(corpus_store, "_MAPPED_BYTES", 0)
    store = ArrowStore(path, len(DOCUMENTS))
    rows = random.Random(1).choices(range(len(DOCUMENTS)), k=4000)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(store.__getitem__, rows)) == [DOCUMENTS[row] for row in rows]


def test_a_writer_that_fails_leaves_no_readable_file(tmp_path: Path) -> None:
    def failing() -> Iterator[Document]:
        yield from DOCUMENTS
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write(tmp_path / "c.arrow", failing())
    with pytest.raises((ValueError, OSError)):
        ArrowStore(tmp_path / "c.arrow", len(DOCUMENTS))
