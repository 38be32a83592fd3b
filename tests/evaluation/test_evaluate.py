"""Scoring collected contexts: figures by hand, the files, and the command line's errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.evaluation.fakes import DOCUMENTS, QUESTIONS, Generator, Retriever
from verl.errors import DataError
from verl.evaluation.collect import collect
from verl.evaluation.collectors import Gathered, NaiveRag
from verl.evaluation.evaluate import main, score_folder
from verl.evaluation.summary import ScoringConfig
from verl.types import Question, SearchResult, Stop, Trajectory, Turn

ASKED = [replace(QUESTIONS[0], kind="1-hop"), replace(QUESTIONS[1], kind="2-hop"), replace(QUESTIONS[2], kind="1-hop")]


async def test_figures_of_naive_rag(tmp_path: Path) -> None:
    await collect(ASKED, NaiveRag(Retriever(), 2), tmp_path / "contexts", {}, "t")
    figures = await score_folder("naive_rag", tmp_path / "contexts", tmp_path, Generator())
    # Right on question 0 alone. Ann is found first for 0 and 1, with Bob behind her; Dee and Cid for 2.
    assert figures["accuracy"] == figures["em"] == figures["span"] == pytest.approx(1 / 3)
    assert figures["accuracy_by_kind"] == {"1-hop": 0.5, "2-hop": 0.0}
    assert figures["recall"] == 1.0
    assert (figures["searches"], figures["documents"], figures["tokens"]) == (1.0, 2.0, 0.0)
    assert (figures["n"], figures["failed"], figures["valid"]) == (3, 0, 1.0)
    assert figures["seconds"] >= 0
    low, high = figures["accuracy_interval"]
    assert 0 <= low <= 1 / 3 <= high <= 1
    rows = [json.loads(line) for line in (tmp_path / "scores" / "naive_rag.jsonl").read_text().splitlines()]
    assert {row["id"]: row["answer"] for row in rows} == {"toy/test/0": "Bob", "toy/test/1": "Bob", "toy/test/2": "Dee"}


class TwoTurns:
    """A policy that searches twice everywhere, writes an invalid turn on question 1 and does not stop on question 2."""

    async def __call__(self, question: Question) -> Gathered:
        result = SearchResult("q", DOCUMENTS[:1], (1.0,))
        turns = (
            Turn((), "", query="q", result=result, invalid=question.id.endswith("1")),
            Turn((), "", query="q", result=result),
        )
        stop = Stop.TURN_LIMIT if question.id.endswith("2") else Stop.FINISHED
        return Gathered(Trajectory(question, (), turns, stop, DOCUMENTS[:1]))


async def test_searches_and_validity_come_from_the_trace(tmp_path: Path) -> None:
    await collect(ASKED, TwoTurns(), tmp_path / "contexts", {}, "t")
    figures = await score_folder("s", tmp_path / "contexts", tmp_path, Generator())
    assert figures["searches"] == 2.0
    assert figures["valid"] == pytest.approx(1 / 3)


async def test_a_failed_answer_is_counted_as_wrong(tmp_path: Path) -> None:
    await collect(ASKED, NaiveRag(Retriever(), 2), tmp_path / "contexts", {}, "t")
    broken = Generator(broken={"toy/test/0"})
    figures = await score_folder(
        "s", tmp_path / "contexts", tmp_path, broken, config=ScoringConfig(max_failed_fraction=0.5)
    )
    assert (figures["accuracy"], figures["failed"], figures["n"]) == (0.0, 1, 3)


async def test_the_published_results_are_written_too(tmp_path: Path) -> None:
    await collect(ASKED, NaiveRag(Retriever(), 2), tmp_path / "contexts", {}, "t")
    await score_folder("rag", tmp_path / "contexts", tmp_path, Generator())
    results = json.loads((tmp_path / "results" / "rag.json").read_text())
    assert results["toy"][ASKED[0].text] == {"answer": "Bob", "score": 1, "em_score": 1}
    assert json.loads((tmp_path / "results" / "rag_stats.json").read_text()) == {
        "toy": {"total": 3, "correct": 1, "accuracy": 1 / 3, "em_correct": 1, "em_accuracy": 1 / 3}
    }


async def test_a_folder_without_contexts_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no contexts\.jsonl"):
        await score_folder("s", tmp_path, tmp_path, Generator())


def test_no_contexts_at_all_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"output={tmp_path}"]) == 2
    assert "contexts is empty; name a folder for each method" in capsys.readouterr().err
