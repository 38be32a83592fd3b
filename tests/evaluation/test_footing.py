"""Which questions are compared, and which folders are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.evaluation.fakes import QUESTIONS
from verl.errors import DataError
from verl.evaluation.collect import Context
from verl.evaluation.footing import on_one_footing
from verl.types import Question, Stop, Trajectory

FIRST, SECOND, THIRD = QUESTIONS


def of(*questions: Question) -> list[Context]:
    return [Context(Trajectory(question, (), (), Stop.FINISHED), "", 0, 0.0) for question in questions]


def ids(contexts: list[Context]) -> list[str]:
    return [context.trajectory.question.id for context in contexts]


def folders(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "s3").mkdir(exist_ok=True)
    return {"rag": tmp_path / "rag", "s3": tmp_path / "s3"}


def test_the_same_questions_come_in_one_order(tmp_path: Path) -> None:
    found = {"rag": of(FIRST, SECOND, THIRD), "s3": of(THIRD, FIRST, SECOND)}
    footing = on_one_footing(folders(tmp_path), found)
    assert ids(footing.contexts["rag"]) == ids(footing.contexts["s3"]) == [q.id for q in QUESTIONS]
    assert (footing.asked, footing.missing) == (3, {})
    asked = on_one_footing(folders(tmp_path), found, [SECOND, THIRD, FIRST])
    assert ids(asked.contexts["s3"]) == [SECOND.id, THIRD.id, FIRST.id]


def test_an_unfinished_folder_is_refused_with_its_cause_or_compared_in_part(tmp_path: Path) -> None:
    found = {"rag": of(FIRST, SECOND, THIRD), "s3": of(SECOND)}
    message = r"contexts.s3=.*s3 is unfinished: 2 of 3 questions are missing, the first is 'toy/test/0'"
    with pytest.raises(DataError, match=message + "; run the same"):
        on_one_footing(folders(tmp_path), found)
    (tmp_path / "s3" / "errors.jsonl").write_text(json.dumps({"id": FIRST.id, "cause": "the engine died"}) + "\n")
    with pytest.raises(DataError, match=message + r" \(.*errors.jsonl lists 1, the first because of the engine died\)"):
        on_one_footing(folders(tmp_path), found)
    footing = on_one_footing(folders(tmp_path), found, partial=True)
    assert ids(footing.contexts["rag"]) == ids(footing.contexts["s3"]) == [SECOND.id]
    assert (footing.asked, footing.missing) == (3, {"s3": 2})


def test_a_question_that_no_method_has_is_missing_too(tmp_path: Path) -> None:
    found = {"rag": of(FIRST), "s3": of(FIRST)}
    with pytest.raises(DataError, match=r"contexts.rag=.* is unfinished: 2 of 3"):
        on_one_footing(folders(tmp_path), found, QUESTIONS)
    assert on_one_footing(folders(tmp_path), found, QUESTIONS, partial=True).missing == {"rag": 2, "s3": 2}


def test_contexts_of_another_question_set_are_refused(tmp_path: Path) -> None:
    other = replace(FIRST, text="Who is the heir of Dee?")
    with pytest.raises(
        DataError, match=r"'toy/test/0' is 'Who is the heir of Dee\?' in contexts.s3=.* and 'Who is the"
    ):
        on_one_footing(folders(tmp_path), {"rag": of(FIRST), "s3": of(other)})
    with pytest.raises(DataError, match="in the questions that are asked; collect all methods"):
        on_one_footing(folders(tmp_path), {"s3": of(other)}, [FIRST])
    with pytest.raises(DataError, match=r"contexts.s3=.* holds 'toy/test/1', which is not among the questions"):
        on_one_footing(folders(tmp_path), {"s3": of(FIRST, SECOND)}, [FIRST])


def test_nothing_in_common_is_no_comparison(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no question is in all of .*rag, .*s3"):
        on_one_footing(folders(tmp_path), {"rag": of(FIRST), "s3": of(SECOND)}, partial=True)
