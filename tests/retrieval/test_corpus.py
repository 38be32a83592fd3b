from __future__ import annotations

import gzip
import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.retrieval.support import PASSAGES, open_corpus, write_corpus, write_jsonl
from verl.errors import DataError
from verl.retrieval.corpus import Corpus, parse_document
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


def test_every_format_gives_the_same_documents_and_fingerprint(tmp_path: Path) -> None:
    quoted = write_corpus(tmp_path / "quoted.jsonl")
    plain = write_jsonl(
        tmp_path / "plain.jsonl", [{"id": id, "contents": f"{title}\n{text}"} for id, title, text in PASSAGES]
    )
    columns = write_jsonl(
        tmp_path / "columns.jsonl", [{"id": id, "title": title, "text": text, "url": 1} for id, title, text in PASSAGES]
    )
    zipped = tmp_path / "zipped.jsonl.gz"
    zipped.write_bytes(gzip.compress(quoted.read_bytes()))
    opened = [Corpus.open(path) for path in (quoted, plain, columns, zipped)]
    assert [list(corpus.documents()) for corpus in opened] == [DOCUMENTS] * 4
    expected = hashlib.sha256("".join(json.dumps(list(p)) + "\n" for p in PASSAGES).encode()).hexdigest()
    assert {corpus.fingerprint for corpus in opened} == {expected}


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
    assert sorted(entry.name for entry in cache.iterdir()) == sorted([f"{fingerprint}.arrow", "c.jsonl.json"])


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
    assert list((tmp_path / "bad.jsonl.cache").iterdir()) == []


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


def test_a_title_over_two_lines_survives_the_one_string_form() -> None:
    document = parse_document(json.dumps({"id": "a", "title": "two\n lines", "text": " x "}).encode())
    assert document == Document("a", "two lines", "x")
    assert Document.from_contents("a", document.contents) == document


def document_or_reason(line: bytes) -> Document | str:
    try:
        return parse_document(line)
    except ValueError as reason:
        return str(reason)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_a_document_or_a_reason(line: bytes) -> None:
    assert document_or_reason(line)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9), lambda inner: st.lists(inner) | inner
)


@given(st.dictionaries(st.sampled_from(["id", "contents", "title", "text", "other"]), values))
def test_any_object_is_a_document_or_a_reason(row: dict[str, object]) -> None:
    outcome = document_or_reason(json.dumps(row).encode())
    if isinstance(outcome, Document):
        assert outcome.id == str(row["id"])
        assert outcome.title or outcome.text
    else:
        assert outcome
