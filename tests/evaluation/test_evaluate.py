"""Scoring collected contexts: figures by hand, the files, and the command line's errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from generator_llms.config import GeneratorConfig
from tests.evaluation.fakes import DOCUMENTS, QUESTIONS, Generator, Retriever
from tests.generator_llms.fake_server import FakeServer, Reply, chat
from verl.errors import DataError
from verl.evaluation.collect import collect
from verl.evaluation.collectors import Gathered, NaiveRag
from verl.evaluation.evaluate import EvaluateConfig, main, run, score_folder
from verl.evaluation.summary import ScoringConfig
from verl.records import write_questions
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


async def test_without_a_generator_passages_and_costs_are_scored(tmp_path: Path) -> None:
    for name, topk in (("one", 1), ("two", 2)):
        await collect(ASKED, NaiveRag(Retriever(), topk), tmp_path / name, {}, "t")
    contexts = {"one": tmp_path / "one", "two": tmp_path / "two"}
    report = await run(EvaluateConfig(tmp_path / "out", contexts, answers=False))
    one, two = report["methods"]["one"], report["methods"]["two"]
    # One document is Ann, Ann and Cid: all, half and all of the gold. The answers are Bob, in Ann's, Cid, and yes.
    assert (one["recall"], two["recall"]) == (pytest.approx(2.5 / 3), 1.0)
    assert (one["answer_in_context"], two["answer_in_context"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert one["accuracy"] is one["em"] is one["macro_accuracy"] is one["by_source"]["toy"]["accuracy"] is None
    assert set(one["intervals"]) >= {"recall", "answer_in_context", "searches"} and "em" not in one["intervals"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## Passages and costs" in text and "| two | all | 100.0 | 100.0–100.0 | 66.7 |" in text
    rows = [json.loads(line) for line in (tmp_path / "out" / "scores" / "one.jsonl").read_text().splitlines()]
    assert (
        len(rows) == 3 and not {"answer", "accurate", "em"} & set(rows[0]) and not (tmp_path / "out/results").exists()
    )


async def test_unfinished_folders_are_refused_or_compared_in_part_and_said_so(tmp_path: Path) -> None:
    await collect(ASKED, NaiveRag(Retriever(), 2), tmp_path / "rag", {}, "t")
    await collect(ASKED[:2], NaiveRag(Retriever(), 2), tmp_path / "s3", {}, "t")
    config = EvaluateConfig(tmp_path / "out", {"rag": tmp_path / "rag", "s3": tmp_path / "s3"}, answers=False)
    with pytest.raises(DataError, match=r"contexts.s3=.* is unfinished: 1 of 3"):
        await run(config)
    report = await run(replace(config, partial=True))
    assert report["partial"] == {"asked": 3, "missing": {"s3": 1}}
    assert {name: found["n"] for name, found in report["methods"].items()} == {"rag": 2, "s3": 2}
    assert (
        "Partial: of 3 questions those that every method has; s3 lacks 1." in (tmp_path / "out/report.md").read_text()
    )


async def test_the_questions_that_were_to_be_asked_may_be_named(tmp_path: Path) -> None:
    await collect(ASKED[:2], NaiveRag(Retriever(), 2), tmp_path / "rag", {}, "t")
    write_questions(tmp_path / "asked.parquet", ASKED, "test")
    config = EvaluateConfig(tmp_path / "out", {"rag": tmp_path / "rag"}, tmp_path / "asked.parquet", answers=False)
    with pytest.raises(DataError, match="is unfinished: 1 of 3 questions are missing, the first is 'toy/test/2'"):
        await run(config)


async def test_a_generator_answers_every_method_and_they_are_compared(tmp_path: Path) -> None:
    for name, topk in (("one", 1), ("two", 2)):
        await collect(ASKED, NaiveRag(Retriever(), topk), tmp_path / name, {}, "t")
    contexts = {"one": tmp_path / "one", "two": tmp_path / "two"}

    def answer(request: dict[str, Any]) -> Reply:
        return chat("Cid" if "The rival of Bob is Cid." in json.dumps(request) else "no idea")

    async with FakeServer(default=answer) as server:
        generator = GeneratorConfig(server.url)
        found = await run(EvaluateConfig(tmp_path / "out", contexts, against="one", generator=generator))
        cut = await run(EvaluateConfig(tmp_path / "cut", contexts, topk=1, generator=generator))
    # Bob's passage is among two documents of questions 0 and 1, and Cid answers question 1 alone.
    assert {name: figures["accuracy"] for name, figures in found["methods"].items()} == {"one": 0, "two": 1 / 3}
    compared = found["methods"]["two"]["against_baseline"]
    assert (compared["won"], compared["lost"], compared["p"]) == (1, 0, 1.0)
    assert {figures["accuracy"] for figures in cut["methods"].values()} == {0}, "cut to one document they are alike"


@pytest.mark.parametrize("wrong", ["judge=true", "against=a"])
def test_what_needs_answers_is_refused_without_them(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["output=o", "contexts.a=a", "answers=false", wrong]) == 2
    assert "answers=false scores no answer" in capsys.readouterr().err


def test_no_contexts_at_all_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"output={tmp_path}"]) == 2
    assert "contexts is empty; name a folder for each method" in capsys.readouterr().err
