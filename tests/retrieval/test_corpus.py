from __future__ import annotations

import gzip
import json
import os
import resource
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest

from tests.retrieval.support import PASSAGES, open_corpus, write_corpus
from verl.errors import ConfigError, DataError
from verl.retrieval.corpus import Corpus
from verl.types import Document

DOCUMENTS = [Document(*passage) for passage in PASSAGES]


def test_rows_are_the_lines_of_the_file(corpus: Corpus) -> None:
    assert len(corpus) == 8
    assert [corpus[row] for row in range(8)] == DOCUMENTS
    assert list(corpus.documents()) == DOCUMENTS
    assert list(corpus.documents(2, 5)) == DOCUMENTS[2:5]
    assert list(corpus.documents(6, 100)) == DOCUMENTS[6:]


@pytest.mark.parametrize("row", [-1, 8])
def test_a_row_outside_is_refused(corpus: Corpus, row: int) -> None:
    with pytest.raises(IndexError, match="outside the corpus's 8 documents"):
        corpus[row]


def test_documents_beyond_one_block_keep_their_order(tmp_path: Path) -> None:
    passages = [(f"p{n}", f"title {n}", f"text {n}") for n in range(9001)]
    corpus = open_corpus(tmp_path, passages)
    assert [document.id for document in corpus.documents(4000, 8300)] == [f"p{n}" for n in range(4000, 8300)]
    assert corpus[9000] == Document("p9000", "title 9000", "text 9000")


def test_integer_ids_blank_lines_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": 7, "contents": "A\\nb"}\n\n{"id": "8", "contents": "C\\nd"}')
    assert list(Corpus.open(path).documents()) == [Document("7", "A", "b"), Document("8", "C", "d")]


def test_a_second_opening_reads_the_converted_file(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "c.jsonl")
    first, state = Corpus.open(path), path.stat()
    path.write_bytes(b"x" * state.st_size)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    again = Corpus.open(path)
    assert again.fingerprint == first.fingerprint and list(again.documents()) == DOCUMENTS


def test_a_changed_file_is_converted_again(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "c.jsonl")
    first = Corpus.open(path)
    write_corpus(path, PASSAGES[:3])
    second = Corpus.open(path)
    assert len(second) == 3 and second.fingerprint != first.fingerprint


@pytest.mark.parametrize("damage", ["truncate", "delete", "manifest"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, damage: str) -> None:
    path, cache = write_corpus(tmp_path / "c.jsonl"), tmp_path / "cache"
    fingerprint = Corpus.open(path, cache).fingerprint
    arrow = cache / f"{fingerprint}.arrow"
    if damage == "truncate":
        arrow.write_bytes(arrow.read_bytes()[:100])
    elif damage == "delete":
        arrow.unlink()
    else:
        (cache / "c.jsonl.json").write_text("{", "utf-8")
    assert list(Corpus.open(path, cache).documents()) == DOCUMENTS
    assert sorted(entry.name for entry in cache.iterdir()) == sorted([".lock", f"{fingerprint}.arrow", "c.jsonl.json"])


GOOD = b'{"id": "a", "contents": "T\\nx"}\n'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{not json}", "not JSON"),
        (b'{"id": "b", "contents": "T\\nx"', "not JSON"),
        (b'{"id": "b", "contents": NaN}', "NaN is not JSON"),
        (b'{"id": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'["b", "T"]', "a JSON list; expected an object"),
        (b"\xff\xfe{}", "not UTF-8 at byte 0"),
        (b'{"contents": "T\\nx"}', "id=None; expected a non-empty string or an integer"),
        (b'{"id": " ", "contents": "T\\nx"}', "id=' '"),
        (b'{"id": true, "contents": "T\\nx"}', "id=True"),
        (b'{"id": 1.5, "contents": "T\\nx"}', "id=1.5"),
        (b'{"id": "b", "contents": 5}', "contents is a int; expected a string"),
        (b'{"id": "b", "contents": " \\n "}', "document 'b' is blank"),
        (b'{"id": "b", "title": "T"}', "no 'text' (found id, title); expected id and contents"),
        (b'{"id": "b", "text": "T"}', "no 'title' (found id, text)"),
        (b'{"id": "b", "contents": "T\\n\\ud800"}', "unpaired surrogate"),
        (b'{"id": "a", "contents": "T\\nx"}', "id 'a' was used on line 1; ids must be unique"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD.replace(b'"a"', b'"z"'))
    with pytest.raises(DataError) as caught:
        Corpus.open(path)
    assert f"{path}, line 3: " in str(caught.value)
    assert reason in str(caught.value)
    assert [entry.name for entry in (tmp_path / "bad.jsonl.cache").iterdir()] == [".lock"]


def test_an_empty_a_missing_and_an_unwritable_corpus_say_so(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n", "utf-8")
    with pytest.raises(DataError, match="holds no document"):
        Corpus.open(empty)
    with pytest.raises(DataError, match="no such file"):
        Corpus.open(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="choose another cache folder with --corpus_cache"):
        Corpus.open(write_corpus(tmp_path / "c.jsonl"), cache_dir=empty / "below a file")


def test_a_broken_gzip_says_so(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"id": n, "contents": f"T\n{n * 7919}"}) + "\n" for n in range(5000)).encode()
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(lines)[:-2000])
    with pytest.raises(DataError, match="broken gzip after line"):
        Corpus.open(path)


def test_several_documents_are_fetched_by_row(corpus: Corpus) -> None:
    assert corpus.rows([3, 0, 3]) == [DOCUMENTS[3], DOCUMENTS[0], DOCUMENTS[3]]
    assert corpus.rows(np.array([7, 1])) == [DOCUMENTS[7], DOCUMENTS[1]]
    assert corpus.ids(np.array([7, 1])) == ["d7", "d1"]
    assert corpus.rows([]) == [] and corpus.ids([]) == []


@pytest.mark.parametrize("rows", [[0, -1], [8], [2**40, 0]])
def test_rows_outside_are_refused(corpus: Corpus, rows: list[int]) -> None:
    for fetch in (corpus.rows, corpus.ids):
        with pytest.raises(IndexError, match="outside the corpus's 8 documents"):
            fetch(rows)


BAD = [b"{not json}", b'{"id": "b", "contents": 5}', b'{"id": "d0", "contents": "Again\\nx"}']


def write_bad(path: Path, bad: Sequence[bytes] = BAD) -> Path:
    """Write the passages with a bad line after each of the first ones."""
    lines = [json.dumps({"id": id, "contents": f"{title}\n{text}"}).encode() for id, title, text in PASSAGES]
    mixed = [line for pair in zip_longest(lines, bad) for line in pair if line is not None]
    path.write_bytes(b"\n".join(mixed) + b"\n")
    return path


def test_skipped_lines_are_counted_logged_and_remembered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_bad(tmp_path / "c.jsonl")
    clean = open_corpus(tmp_path)
    for _ in range(2):
        caplog.clear()
        corpus = Corpus.open(path, on_error="skip")
        assert list(corpus.documents()) == DOCUMENTS
        assert corpus.skipped == 3 and corpus.fingerprint == clean.fingerprint
        assert f"corpus {path}: 3 bad lines are left out" in caplog.text
        assert f"{path}, line 2: not JSON" in caplog.text
        assert f"{path}, line 4: contents is a int" in caplog.text
        assert f"{path}, line 6: id 'd0' was used on line 1; ids must be unique" in caplog.text
    assert clean.skipped == 0


def test_a_cache_with_skipped_lines_is_refused_where_none_may_be_skipped(tmp_path: Path) -> None:
    path = write_bad(tmp_path / "c.jsonl")
    with pytest.raises(DataError, match="line 2: not JSON"):
        Corpus.open(path)
    Corpus.open(path, on_error="skip")
    with pytest.raises(DataError, match=r"line 2: not JSON.*\(3 bad lines were skipped .*--on_error=skip"):
        Corpus.open(path)


def test_a_clean_corpus_is_converted_once_for_both_ways(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "c.jsonl")
    arrow = tmp_path / "c.jsonl.cache" / f"{Corpus.open(path, on_error='skip').fingerprint}.arrow"
    converted = arrow.stat().st_mtime_ns
    assert Corpus.open(path).skipped == 0
    assert arrow.stat().st_mtime_ns == converted


def test_only_the_first_faults_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus = Corpus.open(write_bad(tmp_path / "c.jsonl", [b"{"] * 40), on_error="skip")
    assert corpus.skipped == 40 and list(corpus.documents()) == DOCUMENTS
    assert caplog.text.count("not JSON") == 5


def test_a_corpus_of_bad_lines_alone_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"{\n[\n")
    with pytest.raises(DataError, match=r"holds no document \(2 bad lines; .*line 1: not JSON"):
        Corpus.open(path, on_error="skip")


def test_an_unknown_way_with_errors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="on_error='ignore'; expected one of raise, skip"):
        Corpus.open(write_corpus(tmp_path / "c.jsonl"), on_error="ignore")  # type: ignore[arg-type]


def test_repeated_ids_are_dropped_in_every_block(tmp_path: Path) -> None:
    ids = [str(n) for n in range(9000)]
    for repeat in (1, 4095, 4096, 8999):
        ids[repeat] = "0"
    path = write_corpus(tmp_path / "c.jsonl", [(id, f"title {n}", "x") for n, id in enumerate(ids)])
    corpus = Corpus.open(path, on_error="skip")
    kept = [n for n in range(9000) if n not in (1, 4095, 4096, 8999)]
    assert [document.title for document in corpus.documents()] == [f"title {n}" for n in kept]
    assert (corpus.skipped, len(corpus)) == (4, 8996)


def test_a_full_disk_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "c.jsonl", [(f"p{n}", "title", "text " * 20) for n in range(9000)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, hard))
    try:
        with pytest.raises(
            DataError, match=r"cannot convert it into .* free some space there, or choose another cache"
        ):
            Corpus.open(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [entry.name for entry in (tmp_path / "c.jsonl.cache").iterdir()] == [".lock"]
    assert len(Corpus.open(path)) == 9000


def test_what_a_killed_conversion_left_is_swept_up(tmp_path: Path) -> None:
    path, cache = write_corpus(tmp_path / "c.jsonl"), tmp_path / "cache"
    (cache / ".converting-old").mkdir(parents=True)
    (cache / ".converting-old" / "corpus.arrow").write_bytes(b"half")
    (cache / "tmp-of-somebody-else").mkdir()
    Corpus.open(path, cache)
    assert not (cache / ".converting-old").exists() and (cache / "tmp-of-somebody-else").exists()


def test_one_of_many_openings_converts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_corpus(tmp_path / "c.jsonl", [(f"p{n}", "title", "text") for n in range(20_000)])
    with caplog.at_level("INFO"), ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(Corpus.open, [path] * 4))
    assert [len(corpus) for corpus in opened] == [20_000] * 4
    assert caplog.text.count("converted ") == 1


def test_a_folder_may_be_named_from_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpus").mkdir()
    write_corpus(tmp_path / "corpus" / "a.jsonl")
    monkeypatch.chdir(tmp_path / "corpus")
    assert list(Corpus.open(".").documents()) == DOCUMENTS
    assert (tmp_path / "corpus.cache").is_dir()


def test_a_file_added_to_a_folder_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_corpus(folder / "a.jsonl", PASSAGES[:3])
    assert len(Corpus.open(folder)) == 3
    write_corpus(folder / "b.jsonl", PASSAGES[3:])
    assert list(Corpus.open(folder).documents()) == DOCUMENTS


def test_a_repeated_id_is_placed_across_files(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_corpus(folder / "a.jsonl", PASSAGES[:3])
    write_corpus(folder / "b.jsonl", PASSAGES[2:])
    with pytest.raises(DataError, match=r"b.jsonl, line 1: id 'd2' was used on line 3 of .*a.jsonl; ids must be uniq"):
        Corpus.open(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_says_so(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "c.jsonl")
    path.chmod(0)
    with pytest.raises(DataError, match=r"c.jsonl cannot be read after line 0"):
        Corpus.open(path)
