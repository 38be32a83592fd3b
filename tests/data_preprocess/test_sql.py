"""BIRD's and Spider's questions: raw and published files, schemas, disjoint splits, golds that the reward can run."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_preprocess import sql
from data_preprocess.disjoint import check_disjoint
from data_preprocess.sql import Options, convert, keys
from data_preprocess.sql_schema import drawn, schema_of, without_inserts
from tests.retrieval.engines.sql_support import SPIDER, engine, make_database, needs_spider
from verl.errors import DataError
from verl.records import read_questions
from verl.rewards.sql import ExecutionAccuracy
from verl.types import Question

TABLE = "CREATE TABLE book (id INTEGER PRIMARY KEY, title TEXT)"
SCRIPT = f"{TABLE}; INSERT INTO book VALUES (1, 'Emma'), (2, 'Ulysses'); CREATE TABLE shelf (book INTEGER);"
SCHEMA = f"{TABLE}\n\nCREATE TABLE shelf (book INTEGER)"


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows), encoding="utf-8")


def bird(number: int, **other: Any) -> dict[str, Any]:
    return {
        "db_id": "books",
        "question": f"Which book has number {number}?",
        "evidence": "number refers to id",
        "SQL": f"SELECT title, {number} FROM book WHERE id = 1",
        **other,
    }


def spider(number: int, **other: Any) -> dict[str, Any]:
    row = bird(number)
    return {"db_id": "books", "question": row["question"], "query": row["SQL"], "sql": {"select": [1]}, **other}


def made_bird(folder: Path) -> Path:
    for split in ("train", "dev"):
        make_database(folder / split / f"{split}_databases" / "books" / "books.sqlite", SCRIPT)
    write(
        folder / "train" / "train.json",
        [
            *map(bird, range(30)),
            bird(100),
            bird(31, question="Which other is number 101?", SQL="select title,  101 FROM book WHERE id = 1"),
            bird(32, SQL="SELECT title FROM nowhere"),
            bird(33, SQL="SELECT title FROM book WHERE id = 9"),
            bird(34, evidence="word " * 1000),
        ],
    )
    write(folder / "dev" / "dev.json", [*map(bird, range(100, 104)), bird(104, SQL="SELECT x", evidence="")])
    return folder


def test_bird(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = convert("bird", made_bird(tmp_path / "bird"), tmp_path / "out", Options(validation=2))
    read = {split: tuple(read_questions(tmp_path / f"out/{split}.parquet")) for split in made.splits}
    assert read == made.splits
    assert read["test"][0] == Question(
        "bird/dev/0",
        f"Database Schema:\n{SCHEMA}\n\nExternal Knowledge:\nnumber refers to id\n\n"
        "Question:\nWhich book has number 100?",
        ("SELECT title, 100 FROM book WHERE id = 1",),
        "bird",
        extra={
            "sql": "SELECT title, 100 FROM book WHERE id = 1",
            "question": "Which book has number 100?",
            "knowledge": "number refers to id",
            "db_id": "books",
            # Train and dev have a database of this name each; nothing tells them apart but the folder looked at first.
            "db_path": "train/train_databases/books/books.sqlite",
        },
    )
    assert "External Knowledge" not in read["test"][4].text
    assert {split: len(questions) for split, questions in read.items()} == {"train": 28, "validation": 2, "test": 5}
    assert made.dropped == {
        "train questions with a prompt of more than 1000 words": 1,
        "train questions whose gold fails: invalid": 1,
        "train questions whose gold returns nothing": 1,
        "train questions that test has": 2,  # one by its wording, one by its gold
        "train questions that validation has, or was drawn from": 2,
    }
    assert "1 of 5 test golds fail (invalid); they stay" in caplog.text
    row = pq.read_table(tmp_path / "out/train.parquet").to_pylist()[0]
    assert "Reason first" in row["prompt"][0]["content"] and SCHEMA in row["prompt"][0]["content"]
    assert row["data_source"] == "bird" and row["reward_model"]["ground_truth"]["target"] == [dict(row["extra"])["sql"]]


def test_what_is_written_can_be_rewarded(tmp_path: Path) -> None:
    source = made_bird(tmp_path / "bird")
    made = convert("bird", source, tmp_path / "out", Options(validation=2))
    ExecutionAccuracy().validate([question for questions in made.splits.values() for question in questions])
    tool = engine(source)
    question = read_questions(tmp_path / "out/train.parquet")[0]
    result = asyncio.run(tool(question, question.extra["sql"]))
    assert result.rows[0][0] == "Emma"
    tool.close()


def made_spider(folder: Path, test: bool = True) -> Path:
    make_database(folder / "database" / "books" / "books.sqlite", SCRIPT)
    (folder / "database" / "books" / "schema.sql").write_text(f"{TABLE};\nINSERT INTO book\n VALUES (1);\ninsert it;")
    write(folder / "train_spider.json", [*map(spider, range(20))])
    write(folder / "train_others.json", [*map(spider, range(20, 30))])
    write(folder / "dev.json", [*map(spider, range(200, 206))])
    if test:
        write(folder / "test.json", [*map(spider, range(100, 103)), spider(200)])
    return folder


def test_spider(tmp_path: Path) -> None:
    made = convert("spider", made_spider(tmp_path / "spider"), tmp_path / "out", Options(validation=4))
    assert [question.id for question in made.splits["test"]] == [f"spider/test/{number}" for number in range(4)]
    assert {question.id for question in made.splits["validation"]} <= {f"spider/dev/{number}" for number in range(1, 6)}
    assert len(made.splits["validation"]) == 4 and len(made.splits["train"]) == 30
    assert made.splits["test"][0].text.startswith(f"Database Schema:\n{TABLE};\n VALUES (1);\n\nQuestion:\n")
    assert made.splits["test"][0].extra["db_path"] == "database/books/books.sqlite"


def test_spider_without_a_test_set_and_a_prompt_without_reasoning(tmp_path: Path) -> None:
    options = Options(validation=5, reasoning=False)
    made = convert("spider", made_spider(tmp_path / "spider", test=False), tmp_path / "out", options)
    assert {question.id.split("/")[1] for question in made.splits["test"]} == {"dev"}
    assert {question.id.split("/")[1] for question in made.splits["validation"]} <= {"train_spider", "train_others"}
    prompt = pq.read_table(tmp_path / "out/test.parquet").to_pylist()[0]["prompt"][0]["content"]
    assert "<think>" not in prompt and '{"sql": "your statement"}' in prompt


def test_both_sets_together(tmp_path: Path) -> None:
    made_bird(tmp_path / "raw" / "bird")
    made_spider(tmp_path / "raw" / "spider")
    made = convert("sql_all", tmp_path / "raw", tmp_path / "out", Options(validation=2))
    assert {question.source for question in made.splits["train"]} == {"bird", "spider"}
    assert [question.source for question in made.splits["validation"]] == ["bird", "bird", "spider", "spider"]
    assert {question.extra["db_path"] for question in made.splits["test"]} == {
        "bird/train/train_databases/books/books.sqlite",
        "spider/database/books/books.sqlite",
    }
    tool = engine(tmp_path / "raw")
    results = [asyncio.run(tool(question, question.extra["sql"])) for question in made.splits["train"]]
    tool.close()
    assert all(result.rows for result in results)


def published(number: int, source: str, split: str, database: str = "books", schema: str = TABLE) -> dict[str, Any]:
    asked = bird(number)
    knowledge = "\n\nExternal Knowledge:\nnumber refers to id" if source == "bird" else ""
    content = f"<|im_start|>user\nTask.\nDatabase Schema:\n{schema}{knowledge}\n\n{asked['question']}\n<|im_end|>"
    return {
        "data_source": f"{source}_{split}",
        "prompt": [{"role": "user", "content": content}],
        "ability": "sql_generation",
        "reward_model": {"style": "rule", "ground_truth": {"target": asked["SQL"]}},
        "extra_info": {
            "split": split,
            "index": number,
            "db_path": f"data/raw_data/sql/{source}/database/{database}/{database}.sqlite",
        },
        "question": asked["question"],
        "db_id": database,
        "sql": asked["SQL"],
    } | ({"knowledge": "number refers to id"} if source == "bird" else {})


@pytest.mark.parametrize(("name", "marks"), [("bird", "bird"), ("bird", "bird_wor"), ("spider", "spider"),
                                             ("spider", "spider_wor")])  # fmt: skip
def test_published_parquets_load(tmp_path: Path, name: str, marks: str) -> None:
    folder = tmp_path / "published"
    make_database(folder / "database" / "books" / "books.sqlite", SCRIPT)
    for split, numbers in (("train", range(30)), ("val", range(100, 102)), ("test", range(100, 105))):
        rows = [published(number, name, split) | {"data_source": f"{marks}_{split}"} for number in numbers]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    made = convert(name, folder, tmp_path / "out", Options(validation=3))
    assert {split: len(questions) for split, questions in made.splits.items()} == {
        "train": 27, "validation": 3, "test": 5,
    }  # fmt: skip
    question = made.splits["test"][0]
    assert (question.id, question.source) == (f"{marks}_test/test/0", f"{marks}_test")
    assert question.extra["db_path"] == "database/books/books.sqlite"
    assert ("External Knowledge" in question.text) is (name == "bird")
    assert {question.id.split("/")[0] for question in made.splits["validation"]} == {f"{marks}_train"}, "never of test"


def test_published_prompts_show_the_schema_of_a_database_that_is_not_there(tmp_path: Path) -> None:
    folder = tmp_path / "published"
    folder.mkdir()
    for split, numbers in (("train", range(20)), ("test", range(100, 103))):
        rows = [published(number, "bird", split) for number in numbers]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    made = convert("bird", folder, tmp_path / "out", Options(run_golds=False))
    knowledge = "External Knowledge:\nnumber refers to id"
    asked = "Question:\nWhich book has number 100?"
    assert made.splits["test"][0].text == f"Database Schema:\n{TABLE}\n\n{knowledge}\n\n{asked}"
    assert "db_path" not in made.splits["test"][0].extra
    with pytest.raises(DataError, match="there are no train questions"):
        convert("bird", folder, tmp_path / "other")  # all golds fail


def test_schemas(tmp_path: Path) -> None:
    path = make_database(tmp_path / "a 'b' #%.sqlite", SCRIPT)
    assert schema_of(path) == SCHEMA
    assert schema_of(path, 1) == (
        f"{TABLE}\n/* 1 rows:\nid\ttitle\n1\tEmma\n*/\n\nCREATE TABLE shelf (book INTEGER)\n/* 1 rows:\nbook\n\n*/"
    )
    assert without_inserts("a\nInsert x\nb inserted\nc") == "a\nc"
    entry = {
        "db_id": "d",
        "table_names_original": ["one", "two"],
        "column_names_original": [[-1, "*"], [0, "id"], [0, "name"], [1, "of"]],
        "column_types": ["text", "number", "text", "number"],
        "primary_keys": [1],
        "foreign_keys": [[3, 1]],
    }
    assert drawn(entry) == (
        'CREATE TABLE "one" (\n  "id" number PRIMARY KEY,\n  "name" text\n)\n\n'
        'CREATE TABLE "two" (\n  "of" number,\n  FOREIGN KEY ("of") REFERENCES "one" ("id")\n)'
    )
    (tmp_path / "text.sqlite").write_text("no database " * 100)
    with pytest.raises(DataError, match="cannot be read as a SQLite database"):
        schema_of(tmp_path / "text.sqlite")


def test_tables_json_describes_a_database_that_is_not_there(tmp_path: Path) -> None:
    folder = made_spider(tmp_path / "spider")
    (folder / "database" / "books" / "books.sqlite").unlink()
    entry = {
        "db_id": "books", "table_names_original": ["book"], "column_names_original": [[-1, "*"], [0, "id"]],
        "column_types": ["text", "number"], "primary_keys": [], "foreign_keys": [],
    }  # fmt: skip
    write(folder / "tables.json", [entry])
    made = convert("spider", folder, tmp_path / "out", Options(run_golds=False))
    assert 'CREATE TABLE "book" (\n  "id" number\n)' in made.splits["test"][0].text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x", "db_id": "books"}, "sql is missing; expected a text"),
        ({"SQL": "SELECT 1", "db_id": "books"}, "question is missing"),
        ({"SQL": "SELECT 1", "question": "x"}, "db_id is missing"),
        ({"SQL": "SELECT 1", "question": "x", "db_id": "gone"}, "no database 'gone'"),
        ({"SQL": "SELECT 1", "question": "x", "db_id": "../books"}, "no database '../books'"),
        ({"SQL": "SELECT 1", "question": "x", "db_id": "books", "data_source": "nq"}, "starts with bird"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    source = made_bird(tmp_path / "bird")
    write(source / "dev" / "dev.json", [bird(100), row])
    with pytest.raises(DataError, match=message) as caught:
        convert("bird", source, tmp_path / "out")
    assert "dev.json, item 2" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_command_line(tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture) -> None:
    source = made_bird(tmp_path / "bird")
    flags = ["--dataset", "bird", "--source", str(source), "--save_dir", str(tmp_path / "out")]
    with caplog.at_level(logging.INFO):
        sql.main([*flags, "--validation", "2", "--keep_all"])
    assert "30 train, 2 validation, 5 test" in caplog.text
    with pytest.raises(SystemExit) as caught:
        sql.main(flags)
    assert caught.value.code == 1 and "is not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1"):
        sql.main([*flags[:3], str(tmp_path / "nothing"), "--save_dir", str(tmp_path / "new")])
    assert "no train.json" in capsys.readouterr().err


@needs_spider
def test_real_questions(tmp_path: Path) -> None:
    made = convert("spider", SPIDER, tmp_path / "out")
    assert len(made.splits["test"]) == 972
    assert made.dropped["train questions whose gold returns nothing"] == 26
    lost = sum(made.dropped.values())
    assert len(made.splits["train"]) == 964 - lost, "validation is among what train lost"
    check_disjoint(made.splits, keys)
    databases = {split: {q.extra["db_id"] for q in questions} for split, questions in made.splits.items()}
    assert not databases["test"] & (databases["train"] | databases["validation"])
    assert all("CREATE TABLE" in question.text for questions in made.splits.values() for question in questions)
