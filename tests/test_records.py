"""Questions in parquet: our own round trip, the published variants, and malformed rows."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.errors import DataError
from verl.records import (
    iter_questions,
    parse_documents,
    question_from_row,
    question_to_row,
    read_questions,
    write_questions,
)
from verl.types import Baseline, Document, Question

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
FILLED = TEXT.filter(lambda text: text.strip() != "")
DOCUMENTS = st.lists(st.builds(Document, id=TEXT, title=TEXT, text=TEXT), max_size=3).map(tuple)
QUESTIONS = st.builds(
    Question,
    id=TEXT.map(lambda text: f"world/{text}"),
    text=FILLED,
    answers=st.lists(FILLED, min_size=1, max_size=3).map(tuple),
    source=FILLED,
    gold_titles=st.lists(TEXT, max_size=3, unique=True).map(tuple),
    initial_documents=DOCUMENTS,
    extra=st.dictionaries(TEXT, TEXT, max_size=2),
    baseline=st.none() | st.builds(Baseline, documents=DOCUMENTS, answer=TEXT, correct=st.booleans()),
    kind=TEXT,
)
PARIS = Question(id="nq/train/0", text="where is paris?", answers=("France", "Europe"), source="nq", kind="1-hop")


def published_row(**changes: Any) -> dict[str, Any]:
    """A row as the published preprocessing writes it."""
    truth = {"question": "where is paris?", "target": ["France"], "gt_docs": []}
    return {
        "data_source": "nq",
        "prompt": [{"role": "user", "content": "…"}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"split": "train", "index": 3},
        "id": "train_3",
        "question": "where is paris",
        "golden_answers": ["France"],
        "metadata": None,
        "initial_searched_results": 'Doc 1 (Title: "Paris")\nCapital.\n\nDoc 2 (Title: "Lyon")\nCity.\n\n',
    } | changes


def with_truth(**changes: Any) -> dict[str, Any]:
    truth = published_row()["reward_model"]["ground_truth"] | changes
    return published_row(reward_model={"style": "rule", "ground_truth": truth})


@settings(max_examples=50, deadline=None)
@given(st.lists(QUESTIONS, max_size=4, unique_by=lambda question: question.id))
def test_questions_survive_the_file(questions: list[Question]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "questions.parquet"
        assert write_questions(path, questions, "train") == len(questions)
        assert read_questions(path) == questions


def test_columns_and_values_are_the_published_ones(tmp_path: Path) -> None:
    path = tmp_path / "new" / "train.parquet"
    other = replace(PARIS, id="hotpotqa/train/0", source="hotpotqa", gold_titles=("Paris", "France"))
    write_questions(path, [PARIS, other, replace(PARIS, id="nq/train/9")], "train", lambda q: f"search: {q.text}")
    rows = pq.read_table(path).to_pylist()
    assert [row["extra_info"] for row in rows] == [
        {"split": "train", "index": 0},
        {"split": "train", "index": 0},
        {"split": "train", "index": 1},
    ]
    assert rows[1] == {
        "data_source": "hotpotqa",
        "prompt": [{"role": "user", "content": "search: where is paris?"}],
        "ability": "fact-reasoning",
        "reward_model": {
            "style": "rule",
            "ground_truth": {
                "question": "where is paris?",
                "target": ["France", "Europe"],
                "gt_docs": {"title": ["Paris", "France"]},
            },
        },
        "extra_info": {"split": "train", "index": 0},
        "id": "hotpotqa/train/0",
        "question": "where is paris?",
        "golden_answers": ["France", "Europe"],
        "metadata": {"kind": "1-hop"},
        "initial_searched_results": [],
        "baseline": None,
        "extra": [],
    }


def test_reading_streams_and_stops_at_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "many.parquet"
    write_questions(path, (replace(PARIS, id=f"nq/train/{i}") for i in range(5000)), "train")
    assert [question.id for question in read_questions(path, limit=2)] == ["nq/train/0", "nq/train/1"]
    assert sum(1 for _ in iter_questions(path)) == 5000


def test_a_published_row_is_read() -> None:
    question = question_from_row(published_row(metadata={"type": "bridge", "level": "hard"}))
    assert question == Question(
        id="nq/train_3",
        text="where is paris?",
        answers=("France",),
        source="nq",
        initial_documents=(
            Document("nq/train_3#1", "Paris", "Capital."),
            Document("nq/train_3#2", "Lyon", "City."),
        ),
        kind="bridge",
    )


def test_a_file_written_by_pandas_is_read(tmp_path: Path) -> None:
    path = tmp_path / "published.parquet"
    pd.DataFrame([published_row(), published_row(data_source="hotpotqa")]).to_parquet(path)
    assert [question.id for question in read_questions(path)] == ["nq/train_3", "hotpotqa/train_3"]
    row = pd.read_parquet(path).iloc[0].to_dict()
    assert isinstance(row["golden_answers"], np.ndarray)
    assert question_from_row(row) == read_questions(path)[0]


@pytest.mark.parametrize("target", ["France", ["France"], np.array(["France"], dtype=object)])
def test_target_may_be_a_string_a_list_or_an_array(target: Any) -> None:
    assert question_from_row(with_truth(target=target)).answers == ("France",)


def test_golden_answers_count_when_target_is_absent() -> None:
    assert question_from_row(published_row(reward_model=None)).answers == ("France",)
    assert question_from_row(published_row(reward_model=None)).text == "where is paris"


def test_blank_aliases_are_dropped() -> None:
    assert question_from_row(with_truth(target=["", "France", " "])).answers == ("France",)


@pytest.mark.parametrize(
    "gt_docs",
    [
        {"title": ["A", "A", "B"], "sent_id": [0, 1, 2]},
        [["A", 0], ["A", 1], ["B", 2]],
        [{"title": "A"}, {"title": "B"}],
        np.array(["A", "B"], dtype=object),
    ],
)
def test_gold_titles_of_every_published_form(gt_docs: Any) -> None:
    assert question_from_row(with_truth(gt_docs=gt_docs)).gold_titles == ("A", "B")


def test_a_missing_id_is_made_of_source_split_and_index() -> None:
    assert question_from_row(published_row(id=None)).id == "nq/train/3"


@pytest.mark.parametrize(
    "documents",
    [
        [{"id": "7", "contents": '"Paris"\nCapital.'}],
        [{"document": {"id": 7, "contents": '"Paris"\nCapital.'}, "score": 0.5}],
        [{"id": "7", "title": "Paris", "text": "Capital."}],
    ],
)
def test_structured_initial_documents_are_read(documents: list) -> None:
    read = question_from_row(published_row(initial_searched_results=documents)).initial_documents
    assert read == (Document("7", "Paris", "Capital."),)


@pytest.mark.parametrize(
    ("rendered", "expected"),
    [
        ("", []),
        ("no header", []),
        ("Doc 1(Title: A) x\nDoc 2(Title: B) y", [("A", "x"), ("B", "y")]),
        ('Doc 1 (Title: "Heat (1995 film)") a (b)\n', [("Heat (1995 film)", "a (b)")]),
        ("Doc 1 (Title: Heat (1995 film)) a (b)\n", [("Heat (1995 film)", "a (b)")]),
        ('Doc 1 (Title: "The "X" Files")\nx', [('The "X" Files', "x")]),
        (
            "Doc 1 (Title: A) see Doc 2 (Title: no)\nDoc 3 (Title: no) z",
            [("A", "see Doc 2 (Title: no)\nDoc 3 (Title: no) z")],
        ),
        ("Doc 1 (Title: )\ntext", [("", "text")]),
        ("Doc 1 (Title: open\ntext", [("open", "text")]),
    ],
)
def test_rendered_documents(rendered: str, expected: list[tuple[str, str]]) -> None:
    assert parse_documents(rendered) == expected


WORD = st.text(st.characters(codec="utf-8", categories=("L", "N")), max_size=8)


@given(st.lists(st.tuples(WORD, WORD), max_size=6))
def test_rendering_is_inverted(pairs: list[tuple[str, str]]) -> None:
    rendered = "".join(f'Doc {i} (Title: "{title}")\n{text}\n\n' for i, (title, text) in enumerate(pairs, start=1))
    assert parse_documents(rendered) == pairs


@given(st.text(st.sampled_from('Doc 123(Title:)" \nx'), max_size=60) | st.text(max_size=60))
def test_any_string_can_be_parsed(text: str) -> None:
    assert len(parse_documents(text)) <= text.count("Doc ")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (published_row(data_source=None), "data_source=None; expected the name of the data set"),
        (published_row(reward_model="x"), "reward_model='x' (str); expected a struct"),
        (with_truth(target=[]), "reward_model.ground_truth.target=[] holds no answer"),
        (with_truth(target=[" "]), "holds no answer; expected at least one that is not blank"),
        (with_truth(target=5), "target=5; expected a string or a list of strings"),
        (with_truth(target=[1]), "target=[1]; expected a string or a list of strings"),
        (with_truth(question=" "), "question=' '; expected the question's text"),
        (with_truth(gt_docs=[5]), "gt_docs holds 5; expected a title"),
        (published_row(reward_model=None, golden_answers=None), "golden_answers=None; expected a string or a list"),
        (published_row(id=None, extra_info=None), "id and extra_info.index are both missing"),
        (published_row(initial_searched_results="none"), "expected a rendering that starts with 'Doc 1 (Title: ...)'"),
        (published_row(initial_searched_results=4), "expected a list of documents or their rendered string"),
        (published_row(initial_searched_results=[{"id": "1"}]), "expected {id, title, text} or {id, contents}"),
        (published_row(baseline={"documents": [], "answer": "x", "correct": 1}), "expected a string and a bool"),
        (published_row(extra={"pub_date": 3}), "expected a map of strings to strings"),
    ],
)
def test_malformed_rows_say_what_came_and_what_was_expected(row: dict, message: str) -> None:
    with pytest.raises(DataError) as caught:
        question_from_row(row)
    assert message in str(caught.value)


def test_errors_name_file_and_row(tmp_path: Path) -> None:
    path = tmp_path / "bad.parquet"
    rows = [published_row(), published_row(id="train_4") | {"reward_model": None, "golden_answers": []}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(DataError, match=r"bad\.parquet: row 1: golden_answers=\[\] holds no answer"):
        read_questions(path)
    assert len(read_questions(path, limit=1)) == 1


def test_duplicate_ids_fail_on_reading_and_on_writing(tmp_path: Path) -> None:
    path = tmp_path / "twice.parquet"
    pq.write_table(pa.Table.from_pylist([published_row(), published_row()]), path)
    with pytest.raises(DataError, match=r"row 1: id 'nq/train_3' is also row 0's"):
        read_questions(path)
    with pytest.raises(DataError, match="'nq/train/0' occurs twice"):
        write_questions(tmp_path / "out.parquet", [PARIS, PARIS], "train")


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (replace(PARIS, answers=()), "expected at least one, none of them blank"),
        (replace(PARIS, answers=("France", "")), "expected at least one, none of them blank"),
        (replace(PARIS, id="0"), "has no slash in its id"),
        (replace(PARIS, text="\n"), "both must be given"),
        (replace(PARIS, answers=("\ud800",)), "every text must be valid unicode"),
    ],
)
def test_a_refused_write_leaves_nothing_behind(tmp_path: Path, question: Question, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_questions(tmp_path / "out.parquet", [replace(PARIS, id="nq/train/1"), question], "train")
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_not_question_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a file"):
        read_questions(tmp_path / "missing.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read_questions(tmp_path / "text.parquet")
    write_questions(tmp_path / "damaged.parquet", [PARIS], "train")
    content = bytearray((tmp_path / "damaged.parquet").read_bytes())
    content[4:200] = bytes(196)
    (tmp_path / "damaged.parquet").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read_questions(tmp_path / "damaged.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="has the columns a; expected data_source"):
        read_questions(tmp_path / "other.parquet")


def test_row_conversion_matches_the_file(tmp_path: Path) -> None:
    write_questions(tmp_path / "one.parquet", [PARIS], "train")
    assert pq.read_table(tmp_path / "one.parquet").to_pylist() == [question_to_row(PARIS, "train", 0, PARIS.text)]
