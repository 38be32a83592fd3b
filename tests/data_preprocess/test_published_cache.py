"""The published naive-RAG cache: read as it is published, turned into baselines, written again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_preprocess.published_cache import CacheEntry, ImportConfig, main, merged, read_cache, run, with_baselines
from tests.evaluation.fakes import QUESTIONS
from verl.errors import DataError
from verl.records import read_questions, write_questions
from verl.types import Baseline

FIRST, SECOND, THIRD = QUESTIONS[:3]


def write(folder: Path, cache: object) -> Path:
    path = folder / "rag_cache.json"
    path.write_text(json.dumps(cache))
    return path


def config(folder: Path, cache: object, **rest: object) -> ImportConfig:
    write_questions(folder / "q.parquet", QUESTIONS, "train")
    settings = {"split": "train", **rest}
    return ImportConfig(folder / "q.parquet", write(folder, cache), folder / "out.parquet", **settings)


def entries(*scores: float) -> dict[str, object]:
    answered = zip(QUESTIONS, scores, strict=False)
    return {FIRST.source: {q.text: {"answer": "x", "score": score, "em_score": 0} for q, score in answered}}


def test_entries_become_baselines_and_the_published_filter_applies(tmp_path: Path) -> None:
    counts = run(config(tmp_path, entries(1.0, 0, 0)))
    assert THIRD.answers == ("yes",)
    assert counts == {"read": 3, "written": 1, "naive RAG correct": 1, "bare gold": 1}
    written = read_questions(tmp_path / "out.parquet")
    assert [(question.id, question.baseline) for question in written] == [
        (SECOND.id, Baseline((), "x", False)),
    ]


def test_a_test_set_keeps_all(tmp_path: Path) -> None:
    assert run(config(tmp_path, entries(1, 1, 0), split="test")) == {"read": 3, "written": 3}


def test_a_question_that_the_cache_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 of 3 questions have no entry .*toy 2.*first 'toy/test/1'.*missing=drop"):
        run(config(tmp_path, entries(0)))
    assert run(config(tmp_path, entries(0), missing="drop")) == {"read": 3, "written": 1, "not in the cache": 2}
    assert run(config(tmp_path, entries(0), missing="keep", split="test"))["written"] == 3
    assert [question.baseline is None for question in read_questions(tmp_path / "out.parquet")] == [False, True, True]


@pytest.mark.parametrize("entry", ["text", {"answer": "x"}, {"answer": None, "score": 1}, {"answer": "x", "score": 2}])
def test_a_malformed_entry_is_refused(entry: object) -> None:
    with pytest.raises(DataError, match="entry of question 'toy/test/0'"):
        with_baselines(QUESTIONS, {FIRST.source: {FIRST.text: entry}})  # type: ignore[dict-item]


@pytest.mark.parametrize("text", ["[]", "{", '{"toy": 3}'])
def test_a_file_that_is_no_cache_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rag_cache.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"rag_cache.json.*move the file away"):
        read_cache(path)
    with pytest.raises(DataError, match="no such file"):
        read_cache(tmp_path / "none.json")


def test_new_entries_join_those_of_other_questions() -> None:
    old = {"nq": {"Old?": {"answer": "o", "score": 1, "em_score": 0}}, "toy": {"Older?": {"answer": "p"}}}
    assert merged(old, [(FIRST, CacheEntry("Bob", True, False))]) == {
        "nq": old["nq"],
        "toy": {"Older?": {"answer": "p"}, FIRST.text: {"answer": "Bob", "score": 1, "em_score": 0}},
    }


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = config(tmp_path, entries(0, 0, 0))
    arguments = [f"questions={made.questions}", f"cache={made.cache}", f"output={made.output}", "split=train"]
    assert main(arguments) == 0 and len(read_questions(made.output)) == 2
    assert main([*arguments[:2], f"output={made.questions}", "split=train"]) == 2
    assert "write to another one" in capsys.readouterr().err
