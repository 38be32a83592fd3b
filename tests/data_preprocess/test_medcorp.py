from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from data_preprocess.medcorp import convert, main
from verl.errors import DataError
from verl.retrieval.corpus import Corpus
from verl.types import Document

# As published: textbooks and PubMed with `contents` on one line, StatPearls without; no newline at the end of a file.
TEXTBOOK = {
    "id": "Anatomy_Gray_0",
    "title": "Anatomy_Gray",
    "content": "What is anatomy?\nIt comes from the Greek temnein.",
    "contents": "Anatomy_Gray. What is anatomy? It comes from the Greek temnein.",
}
ABSTRACT = {
    "id": "pubmed23n0001_0",
    "title": '"Formate" assays in  body fluids.',
    "content": "",
    "contents": '"Formate" assays in  body fluids. ',
    "PMID": 1,
}
ARTICLE = {"id": "article-100024_3", "title": "Asthma -- Étiologie -- Genes", "content": " Airways\u2028narrow. "}


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), "utf-8")
    return path


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """The layout of the downloads."""
    folder = tmp_path / "medcorp"
    write(folder / "textbooks" / "chunk" / "Anatomy_Gray.jsonl", TEXTBOOK)
    write(folder / "textbooks" / "README.md", "# The Textbooks Corpus")
    write(folder / "pubmed" / "chunk" / "pubmed23n0002.jsonl", {**ABSTRACT, "id": "pubmed23n0002_0"})
    write(folder / "pubmed" / "chunk" / "pubmed23n0001.jsonl", ABSTRACT)
    write(folder / "pubmed" / "chunk" / "pubmed23n0003.jsonl", "")  # some published files are empty
    return folder


def test_all_chunks_become_one_corpus(published: Path, tmp_path: Path) -> None:
    statpearls = write(tmp_path / "corpus" / "statpearls" / "chunk" / "article-100024.jsonl", ARTICLE).parents[1]
    target = tmp_path / "data" / "medcorp.jsonl"
    counts = convert([published / "textbooks", published / "pubmed", statpearls], target)
    assert counts == {"files": 5, "chunks": 4, "skipped": 0}
    lines = [json.loads(line) for line in target.read_text("utf-8").split("\n") if line]
    assert lines[0] == {"id": TEXTBOOK["id"], "contents": f'"Anatomy_Gray"\n{TEXTBOOK["content"]}'}
    abstract = Document("pubmed23n0001_0", '"Formate" assays in body fluids.', "")
    assert list(Corpus.open(target).documents()) == [
        Document("Anatomy_Gray_0", "Anatomy_Gray", TEXTBOOK["content"]),
        abstract,
        Document("pubmed23n0002_0", abstract.title, ""),
        Document("article-100024_3", "Asthma -- Étiologie -- Genes", "Airways\u2028narrow."),
    ]
    assert not list(target.parent.glob(".medcorp*"))


def test_the_corpus_is_what_the_chunks_themselves_would_be(published: Path, tmp_path: Path) -> None:
    main(["--sources", str(published), "--save_path", str(tmp_path / "all.jsonl")])
    assert Corpus.open(tmp_path / "all.jsonl").fingerprint == Corpus.open(published).fingerprint


def test_a_gzipped_file_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(TEXTBOOK).encode()))
    assert convert([path], tmp_path / "out.jsonl")["chunks"] == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ('"text"', "a JSON str; expected an object"),
        ({**TEXTBOOK, "id": " "}, "id=' '; expected a non-empty string"),
        ({"id": "1", "title": "T"}, "no text under 'content' (found id, title); expected id, title and content"),
        ({**TEXTBOOK, "title": None}, "no text under 'title' (found a NoneType)"),
        ({**TEXTBOOK, "title": "", "content": "\n"}, "chunk 'Anatomy_Gray_0' is blank"),
        ('{"id": "1", "title": "T", "content": "\\ud800"}', "an unpaired surrogate"),
    ],
)
def test_a_line_that_is_no_chunk_is_named_or_skipped(tmp_path: Path, line: object, reason: str) -> None:
    path = write(tmp_path / "chunk" / "a.jsonl", TEXTBOOK, "", line, ARTICLE)
    with pytest.raises(DataError) as caught:
        convert([path.parent], tmp_path / "out.jsonl")
    assert f"{path}, line 3: {reason}" in str(caught.value) and "--on_error skip" in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["chunk"]
    counts = convert([path.parent], tmp_path / "out.jsonl", "skip")
    assert counts == {"files": 1, "chunks": 2, "skipped": 1}


def test_wrong_arguments_say_so(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*sources: Path, save_path: Path = tmp_path / "out.jsonl") -> str:
        with pytest.raises(SystemExit) as caught:
            main(["--sources", *map(str, sources), "--save_path", str(save_path)])
        assert caught.value.code == 1 and not (tmp_path / "out.jsonl").exists()
        return capsys.readouterr().err

    assert "no such file or folder" in fails(tmp_path / "nowhere")
    assert "belongs to two of the --sources" in fails(published, published / "pubmed")
    empty = write(tmp_path / "empty" / "a.jsonl", "")
    assert "no chunk in 1 files" in fails(empty.parent)
    assert f"{empty} exists; move it away" in fails(published, save_path=empty)
    assert "free some space or pass another --save_path" in fails(published, save_path=empty / "below.jsonl")
