"""Somebody's own documents and questions."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_preprocess.custom import CorpusOptions, QuestionsOptions, main, write_corpus, write_splits
from data_preprocess.documents import ENDINGS, Columns, SourceText, csv_rows, read_documents
from verl.errors import DataError
from verl.records import read_questions
from verl.retrieval.corpus import Corpus
from verl.types import Question

PAGE = Path(__file__).resolve().parents[2] / "docs" / "custom_data.md"
HEADER = "question,answers,gold_titles\n"


def put(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read(folder: Path, columns: Columns | None = None) -> list[SourceText]:
    return list(read_documents(folder, columns or Columns()))


def questions(tmp_path: Path, table: str, **more: object) -> dict[str, list[Question]]:
    options = QuestionsOptions(put(tmp_path, "q.csv", table), tmp_path / "out", **more)  # type: ignore[arg-type]
    return {split: read_questions(tmp_path / "out" / f"{split}.parquet") for split in write_splits(options)}


def test_documents_of_every_kind_and_their_titles(tmp_path: Path) -> None:
    put(tmp_path, "north_mill.txt", "A mill.")
    put(
        tmp_path,
        "deep/er/page.md",
        "Intro.\n\n# The [Mill](http://x) #\n\n## Part\nSee ![pic](p.png)[here](h).\n```\ncode\n```\n",
    )
    put(tmp_path, "front.md", "---\ntitle: 'Stated'\ndate: 1\n---\n# Heading\ntext\n")
    put(tmp_path, "bare.md", "only text")
    put(
        tmp_path,
        "page.html",
        "<title>A &amp; B</title><script>x=1</script><p>One<b>two</b></p><div>three<br>four</div>",
    )
    put(tmp_path, "rows.csv", 'id,Title,text\n7,Ada,"Born, she was"\n,,untitled\n')
    put(tmp_path, "rows.jsonl", '{"title": "Rye", "text": "A town."}\n\n{"text": "x"}\n')
    put(tmp_path, "skipped.pdf", "%PDF")
    put(tmp_path, ".hidden/no.txt", "no")
    found = {source.name: (source.title, " ".join(source.text.split())) for source in read(tmp_path)}
    assert found == {
        "north_mill.txt": ("north mill", "A mill."),
        "deep/er/page.md": ("The Mill", "Intro. Part See here. code"),
        "front.md": ("Stated", "text"),
        "bare.md": ("bare", "only text"),
        "page.html": ("A & B", "Onetwo three four"),
        "rows.csv:7": ("Ada", "Born, she was"),
        "rows.csv:2": ("rows", "untitled"),
        "rows.jsonl:1": ("Rye", "A town."),
        "rows.jsonl:2": ("rows", "x"),
    }


def test_a_corpus_of_passages_with_their_titles(tmp_path: Path) -> None:
    put(tmp_path, "docs/mill.txt", "One two three. Four five.\n\nSix seven eight.")
    put(tmp_path, "docs/my copy/mill.txt", "Ten.")
    put(tmp_path, "docs/z/mill.txt", "Six, seven: eight!")
    counts = write_corpus(CorpusOptions(tmp_path / "docs", tmp_path / "corpus.jsonl", words=5))
    assert (counts.documents, counts.passages, counts.words, counts.repeated, counts.skipped) == (3, 3, 9, 1, 0)
    pages = [(page.id, page.title, page.text) for page in Corpus.open(tmp_path / "corpus.jsonl").documents()]
    assert pages == [
        ("mill.txt#1", "mill", "One two three. Four five."),
        ("mill.txt#2", "mill", "Six seven eight."),
        ("my%20copy/mill.txt#1", "mill", "Ten."),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", " \n", r"a.txt: holds no text"),
        ("a.jsonl", '{"body": "x"}\n', r"a.jsonl:1: no column 'text' \(found body\); say which with --text_column"),
        ("a.jsonl", "{", r"a.jsonl:1: not JSON"),
        ("a.csv", "text,text\na,b\n", r"a.csv:1: the header names a column twice"),
        ("a.csv", "id,text\n1,x\n1,y\n", r"a.csv:3: id '1' occurs twice"),
        ("a.csv", "id,text\n1,x,y\n", r"a.csv:2: 2 columns in the header, 3 in the row"),
        ("a.csv", 'id,text\n1,"x" y\n', r"a.csv:2: malformed"),
        ("a.jsonl", '{"text": "\\ud800"}\n', "unpaired surrogate"),
    ],
)
def test_a_document_that_cannot_be_used(tmp_path: Path, name: str, text: str, message: str) -> None:
    put(tmp_path, f"docs/{name}", text)
    options = CorpusOptions(tmp_path / "docs", tmp_path / "corpus.jsonl")
    with pytest.raises(DataError, match=message):
        write_corpus(options)
    assert not (tmp_path / "corpus.jsonl").exists() and not list(tmp_path.glob(".corpus-*"))
    put(tmp_path, "docs/good.txt", "fine")
    counts = write_corpus(CorpusOptions(tmp_path / "docs", tmp_path / "corpus.jsonl", on_error="skip"))
    assert counts.skipped == 1 and counts.documents >= 1


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    assert "cannot be read as UTF-8" in read(tmp_path)[0].fault


def test_no_documents(tmp_path: Path) -> None:
    put(tmp_path, "a.pdf", "x")
    for folder in (tmp_path, tmp_path / "a.pdf", tmp_path / "absent"):
        with pytest.raises(DataError, match=r"holds no document; expected files that end in .txt, .md"):
            read(folder)


def test_a_very_long_cell_is_read(tmp_path: Path) -> None:
    path = put(tmp_path, "long.csv", "text\n" + "word " * 60_000 + "\n")
    assert len(read(path)[0].text) == 300_000


def test_questions_become_parquets(tmp_path: Path) -> None:
    table = "ID,Question,answer,answer_2,gold_titles,kind,split,remark\n"
    table += "a,Who is  it,Ada|A. B.,Ms Brook,Mill|Rye,2-hop,test,x\nb,Why?,Yes,,,,Train,\n,When?,1871,,,,dev,\n"
    found = questions(tmp_path, table, name="mine")
    assert found["test"] == [
        Question("mine/test/a", "Who is it", ("Ada", "A. B.", "Ms Brook"), "mine", ("Mill", "Rye"), kind="2-hop")
    ]
    assert [question.id for question in found["train"]] == ["mine/train/b"]
    assert [question.id for question in found["validation"]] == ["mine/validation/0"]


def test_a_seeded_share_is_tested_on(tmp_path: Path) -> None:
    table = HEADER + "".join(f"question {n},a,\n" for n in range(20))
    first = questions(tmp_path / "1", table)
    assert {split: len(asked) for split, asked in first.items()} == {"train": 16, "test": 4}
    assert questions(tmp_path / "2", table) == first != questions(tmp_path / "3", table, seed=1)
    assert set(questions(tmp_path / "4", table, test_share=1.0)) == {"test"}
    two = questions(tmp_path / "5", HEADER + "a?,x,\nb?,x,\n", test_share=0.01)
    assert {split: len(asked) for split, asked in two.items()} == {"train": 1, "test": 1}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("who?,,\n", r"q.csv:2: question='who\?', answers=\[\]; expected a question and at least one answer"),
        (" ,Ada,\n", r"q.csv:2: question=''"),
        ("who?,Ada,\nWHO,Ada,\n", r"q.csv:3: its question or id is also line 2's"),
        ("who?,Ada,Mil\n", r"q.csv:2: gold title 'Mil' is not in the corpus; did you mean 'Mill'\?"),
        ("who, really?,Ada,x,y\n", r"q.csv:2: 3 columns in the header, 5 in the row"),
    ],
)
def test_a_row_that_cannot_be_used(tmp_path: Path, rows: str, message: str) -> None:
    corpus = put(tmp_path, "corpus.jsonl", json.dumps({"id": "1", "contents": '"Mill"\nA mill.'}) + "\n")
    with pytest.raises(DataError, match=message):
        questions(tmp_path, HEADER + rows, corpus=corpus)
    kept = questions(tmp_path, HEADER + rows + "fine?,Ada,mill\n", corpus=corpus, on_error="skip", test_share=0.0)
    assert kept["train"][-1].text == "fine?"


def test_missing_columns_and_bad_splits(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found the columns query, answers; expected question, and answers"):
        questions(tmp_path, "query,answers\nq,a\n")
    with pytest.raises(DataError, match="split='dve'; expected train, validation or test"):
        questions(tmp_path, "question,answers,split\nq,a,dve\n")
    with pytest.raises(DataError, match="holds no question that can be used"):
        questions(tmp_path, HEADER)
    with pytest.raises(DataError, match="cannot be read"):
        write_splits(QuestionsOptions(tmp_path / "absent.csv", tmp_path))


@given(st.text())
@example('"')
@example('a\n"')
def test_any_table_is_rows_or_faults(text: str) -> None:
    for line, row in csv_rows(text, ".csv"):
        assert line >= 1 and (isinstance(row, str) or all(isinstance(cell, str) for cell in row.values()))


def test_the_pages_own_example_and_endings(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    table = re.search(r"```csv\n(.*?)```", page, re.DOTALL)
    assert table is not None
    put(tmp_path, "documents/North_Mill.txt", "The warden of the north mill is Ada Brook.")
    put(tmp_path, "documents/ada.md", "# Ada Brook\n\nBorn in 1871.")
    main(["corpus", "--documents", str(tmp_path / "documents"), "--output", str(tmp_path / "corpus.jsonl")])
    asked = questions(tmp_path, table[1], corpus=tmp_path / "corpus.jsonl")
    both = sorted((question for split in asked.values() for question in split), key=lambda question: question.text)
    assert both[1].answers == ("Ada Brook", "A. Brook") and both[0].gold_titles == ("North Mill", "Ada Brook")
    assert all(f"`{ending}`" in page for ending in ENDINGS)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "docs/a.csv", "body\nAda kept it.\n")
    arguments = ["corpus", "--documents", str(tmp_path / "docs"), "--output", str(tmp_path / "c.jsonl")]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 1 and "say which with --text_column" in capsys.readouterr().err
    main([*arguments, "--text_column", "body"])
    assert "1 passages of 3 words on average from 1 documents" in capsys.readouterr().out
    table = put(tmp_path, "q.tsv", "question\tanswers\nwho?\tAda\nwhy?\tSo\n")
    main(["questions", "--questions", str(table), "--output", str(tmp_path)])
    assert "train.parquet: 1 questions" in capsys.readouterr().out
    for wrong in (["--words", "0"], ["--text_column", "body", "--words", "-1"]):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *wrong])
        assert ended.value.code == 1
