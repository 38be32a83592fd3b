from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.retrieval.support import PASSAGES, write_corpus, write_jsonl
from verl.errors import DataError
from verl.retrieval.corpus import Corpus
from verl.retrieval.corpus_formats import Fault, parse_document, read_corpus, source_files
from verl.types import Document

DOCUMENTS = [Document(*passage) for passage in PASSAGES]


def write_tsv(path: Path, header: str = "id\ttext\ttitle") -> Path:
    """Write the passages as DPR does: csv quoting with tabs."""
    out = io.StringIO()
    out.write(header + "\n")
    csv.writer(out, delimiter="\t", lineterminator="\n").writerows((id, text, title) for id, title, text in PASSAGES)
    path.write_text(out.getvalue(), "utf-8")
    return path


def write_quoted(folder: Path) -> Path:
    return write_corpus(folder / "quoted.jsonl")


def write_plain(folder: Path) -> Path:
    rows = [{"id": id, "contents": f"{title}\n{text}"} for id, title, text in PASSAGES]
    return write_jsonl(folder / "plain.jsonl", rows)


def write_columns(folder: Path) -> Path:
    rows = [{"id": id, "title": title, "text": text, "url": 2**80} for id, title, text in PASSAGES]
    return write_jsonl(folder / "columns.jsonl", rows)


def write_medcorp(folder: Path) -> Path:
    rows = [{"id": id, "title": title, "content": text, "contents": f"{title}. {text}"} for id, title, text in PASSAGES]
    return write_jsonl(folder / "chunk.jsonl", rows)


def write_beir(folder: Path) -> Path:
    rows = [{"_id": id, "title": title, "text": text, "metadata": {}} for id, title, text in PASSAGES]
    beir = folder / "beir"
    (beir / "qrels").mkdir(parents=True)
    write_jsonl(beir / "corpus.jsonl", rows)
    write_jsonl(beir / "queries.jsonl", [{"_id": "q", "text": "no document"}])
    return beir


def write_zipped_beir(folder: Path) -> Path:
    beir = write_beir(folder)
    zip_file(beir / "corpus.jsonl").rename(beir / "corpus.jsonl.gz")
    return beir


def write_chunks(folder: Path) -> Path:
    chunks = folder / "chunks"
    (chunks / "part").mkdir(parents=True)
    write_corpus(chunks / "b.jsonl", PASSAGES[3:5])
    zip_file(write_corpus(chunks / "a.jsonl", PASSAGES[:3])).rename(chunks / "a.jsonl.gz")
    write_corpus(chunks / "part" / "c.jsonl", PASSAGES[5:])
    (chunks / "README.md").write_text("no document")
    (chunks / ".git").mkdir()
    write_jsonl(chunks / ".git" / "x.jsonl", ["no document"])
    return chunks


def zip_file(path: Path) -> Path:
    """Replace a file by its gzip, under the same name, so that only the content tells."""
    path.write_bytes(gzip.compress(path.read_bytes()))
    return path


@pytest.mark.parametrize(
    "write",
    [
        write_quoted,
        write_plain,
        write_columns,
        write_medcorp,
        write_beir,
        write_zipped_beir,
        write_chunks,
        lambda folder: zip_file(write_quoted(folder)),
        lambda folder: write_beir(folder) / "corpus.jsonl",
        lambda folder: write_tsv(folder / "psgs_w100.tsv"),
        lambda folder: write_tsv(folder / "named-otherwise"),
        lambda folder: zip_file(write_tsv(folder / "psgs_w100.tsv")),
    ],
)
def test_every_format_gives_the_same_documents_and_fingerprint(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    corpus = Corpus.open(write(tmp_path))
    assert list(corpus.documents()) == DOCUMENTS
    expected = hashlib.sha256("".join(json.dumps(list(p)) + "\n" for p in PASSAGES).encode()).hexdigest()
    assert corpus.fingerprint == expected


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_the_fingerprint_is_the_documents_as_json(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    path = tmp_path_factory.mktemp("corpus") / "c.jsonl"
    path.write_text(
        "".join(json.dumps({"id": n, "title": a, "text": f"x{b}"}) + "\n" for n, (a, b) in enumerate(pairs))
    )
    corpus = Corpus.open(path)
    rows = [[document.id, document.title, document.text] for document in corpus.documents()]
    assert corpus.fingerprint == hashlib.sha256("".join(json.dumps(row) + "\n" for row in rows).encode()).hexdigest()
    assert [corpus[row] for row in range(len(corpus))] == [Document(*row) for row in rows]
    assert [row[1:] for row in rows] == [[" ".join(a.split()), f"x{b}".strip()] for a, b in pairs]


def test_columns_of_a_tsv_may_come_in_any_order_and_more_of_them(tmp_path: Path) -> None:
    path = tmp_path / "c.tsv"
    path.write_text('Title\turl\tid\ttext\n"The ""Great"" War"\thttp://x\t7\t"It began\tin 1914."\n', "utf-8")
    assert list(Corpus.open(path).documents()) == [Document("7", 'The "Great" War', "It began\tin 1914.")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"2\tonly text", "2 columns; expected 3, as in the header"),
        (b"2\ta\tb\tc", "4 columns"),
        (b'2\t"never closed\tT', "not a row of a tsv"),
        (b'2\t"closed" early\tT', "not a row of a tsv"),
        (b"2\t\xff\tT", "not UTF-8 at byte 2"),
        (b" \tx\tT", "id=' '"),
        (b"2\t \t ", "document '2' is blank"),
    ],
)
def test_a_bad_row_of_a_tsv_is_named_and_costs_no_other(tmp_path: Path, row: bytes, reason: str) -> None:
    path = tmp_path / "c.tsv"
    path.write_bytes(b"id\ttext\ttitle\n1\tx\tT\n" + row + b"\n3\ty\tU\n")
    with pytest.raises(DataError) as caught:
        Corpus.open(path)
    assert f"{path}, line 3: " in str(caught.value) and reason in str(caught.value)
    assert [document.id for document in Corpus.open(path, on_error="skip").documents()] == ["1", "3"]


def test_a_tsv_without_the_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.tsv"
    path.write_text("1\tx\tT\n", "utf-8")
    with pytest.raises(DataError, match=r"has the columns '1, x, t'; expected a header with id, text, title"):
        Corpus.open(path, on_error="skip")


def test_jsonl_under_the_name_of_a_tsv_is_read_as_what_it_is(tmp_path: Path) -> None:
    assert list(Corpus.open(write_corpus(tmp_path / "c.tsv")).documents()) == DOCUMENTS


def test_medcorp_with_a_title_line_keeps_its_contents() -> None:
    row = {"id": 1, "title": "other", "content": "other", "contents": "Title\nText"}
    assert parse_document(json.dumps(row).encode()) == Document("1", "Title", "Text")


def test_an_integer_id_of_any_size_is_read() -> None:
    assert parse_document(b'{"id": %d, "contents": "T\\nx"}' % 2**70).id == str(2**70)


def test_a_folder_of_no_jsonl_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(DataError, match="the folder holds no jsonl file"):
        source_files(tmp_path)


def test_places_tell_file_and_line(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_bytes(b'\n{"id": 1, "contents": "T\\nx"}\n')
    second.write_bytes(b'{"id": 2, "contents": "T\\nx"}\n\n{\n')
    read = list(read_corpus((first, second)))
    assert [entry for _, entry in read[:2]] == [Document("1", "T", "x"), Document("2", "T", "x")]
    fault = read[2][1]
    assert isinstance(fault, Fault) and (fault.path, fault.line) == (second, 3)


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


def test_a_long_passage_of_a_tsv_is_a_document(tmp_path: Path) -> None:
    path = tmp_path / "psgs_w100.tsv"
    text = "word " * 40_000
    path.write_text(f"id\ttext\ttitle\n1\t{text.strip()}\tLong\n")
    (document,) = Corpus.open(path).rows([0])
    assert (document.id, document.title, document.text) == ("1", "Long", text.strip())
