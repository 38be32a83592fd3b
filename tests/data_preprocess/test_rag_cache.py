"""Naive-RAG precompute: what is written, resuming, the training filter, and failing services."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data_preprocess.rag_cache import (
    BaselineConfig,
    NaiveRagAnswers,
    Outcome,
    RagCacheConfig,
    main,
    precompute,
    write_prepared,
)
from data_preprocess.train_filter import TrainFilter, select
from tests.evaluation.fakes import DOCUMENTS, QUESTIONS, Generator, Retriever
from verl.errors import DataError
from verl.evaluation.collect import RunConfig
from verl.evaluation.journal import Journal, Unfinished
from verl.records import read_questions, write_questions
from verl.types import Baseline, Question

COUNTS = BaselineConfig(retrieve_k=3, baseline_k=2, initial_k=1)


async def run(
    folder: Path, retriever: Retriever, generator: Generator, counts: BaselineConfig = COUNTS
) -> list[tuple[Question, Outcome]]:
    answers = NaiveRagAnswers(counts, retriever, generator)
    with Journal(folder / "j.jsonl", {"k": counts.retrieve_k}) as journal:
        return await precompute(QUESTIONS, answers, journal, folder / "errors.jsonl", counts, RunConfig())


async def test_each_question_gets_its_documents_and_its_baseline(tmp_path: Path) -> None:
    generator = Generator()
    precomputed = await run(tmp_path, Retriever(), generator)
    prepared = [question for question, _ in precomputed]
    # Question 0 finds Ann first, whose passage ends with the answer; 1 finds Ann too and gets the bridge instead.
    assert [question.baseline.answer for question in prepared if question.baseline] == ["Bob", "Bob", "Dee"]
    assert prepared[0] == replace(
        QUESTIONS[0],
        initial_documents=DOCUMENTS[:1],
        baseline=Baseline(DOCUMENTS[:2], "Bob", True),
    )
    assert precomputed[0][1] == Outcome(DOCUMENTS[:3], (0.0, -1.0, -2.0), "Bob", True, True, 2)
    assert not precomputed[1][1].correct
    assert sorted(generator.asked) == [question.id for question in QUESTIONS]


async def test_a_killed_run_goes_on_without_repeating(tmp_path: Path) -> None:
    first = await run(tmp_path, Retriever(), Generator())
    journal = tmp_path / "j.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-1]) + lines[-1][:20])
    retriever, generator = Retriever(), Generator()
    assert await run(tmp_path, retriever, generator) == first
    assert len(retriever.queries) == len(generator.asked) == 1
    assert journal.read_text() == "".join(lines)


async def test_round_0_can_change_without_asking_again(tmp_path: Path) -> None:
    await run(tmp_path, Retriever(), Generator())
    generator = Generator()
    precomputed = await run(tmp_path, Retriever(), generator, replace(COUNTS, initial_k=3))
    assert precomputed[0][0].initial_documents == DOCUMENTS[:3]
    assert generator.asked == []


async def test_a_failed_question_is_listed_and_the_others_are_kept(tmp_path: Path) -> None:
    with pytest.raises(Unfinished, match=r"1 of 3 questions failed.*'toy/test/1': GeneratorError: gave no answer"):
        await run(tmp_path, Retriever(), Generator(broken={"toy/test/1"}))
    errors = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert errors == [{"id": "toy/test/1", "cause": "GeneratorError: gave no answer"}]
    generator = Generator()
    assert len(await run(tmp_path, Retriever(), generator)) == 3
    assert generator.asked == ["toy/test/1"]
    assert not (tmp_path / "errors.jsonl").exists()


async def test_the_judge_decides_where_no_gold_is_found(tmp_path: Path) -> None:
    async def judge(question: Question, answer: str) -> bool:
        return question.id == "toy/test/1"

    answers = NaiveRagAnswers(COUNTS, Retriever(), Generator(), judge)
    with Journal(tmp_path / "j.jsonl", {}) as journal:
        found = await precompute(QUESTIONS, answers, journal, tmp_path / "e", COUNTS, RunConfig())
    assert [(outcome.correct, outcome.exact) for _, outcome in found] == [(True, True), (True, False), (False, False)]


def with_baseline(question: Question, correct: bool) -> Question:
    return replace(question, baseline=Baseline((), "x", correct))


def test_the_filter_is_the_published_one() -> None:
    questions = [
        with_baseline(QUESTIONS[0], True),
        with_baseline(QUESTIONS[1], False),
        with_baseline(replace(QUESTIONS[0], id="toy/test/3", answers=("North", " False ")), True),
        with_baseline(replace(QUESTIONS[0], id="toy/test/4", answers=("Yes, in 1990",)), False),
        replace(QUESTIONS[1], id="toy/test/5"),
    ]
    kept, dropped = select(questions, TrainFilter())
    assert [question.id for question in kept] == ["toy/test/1", "toy/test/4", "toy/test/5"]
    assert dropped == {"naive RAG correct": 1, "bare gold": 1}
    assert select(questions, TrainFilter(drop_rag_correct=False))[1] == {"bare gold": 1}
    assert select(questions, TrainFilter(drop_bare_golds=False, drop_rag_correct=False))[0] == questions


async def test_the_filter_is_for_training_only(tmp_path: Path) -> None:
    precomputed = await run(tmp_path, Retriever(), Generator())
    paths = {split: tmp_path / f"{split}.parquet" for split in ("train", "test")}
    summaries = {
        split: write_prepared(RagCacheConfig(tmp_path / "q", path, split), precomputed) for split, path in paths.items()
    }
    assert [question.id for question in read_questions(paths["train"])] == ["toy/test/1"]
    assert read_questions(paths["test"]) == [question for question, _ in precomputed]
    assert (summaries["train"].asked, summaries["train"].written) == (3, 1)
    assert summaries["train"].dropped == {"naive RAG correct": 1, "bare gold": 1}
    assert summaries["test"].dropped == {}
    assert summaries["test"].accuracy == summaries["test"].exact == pytest.approx(1 / 3)
    with pytest.raises(DataError, match=r"none of the 1 questions is left.*switch a filter off"):
        write_prepared(RagCacheConfig(tmp_path / "q", paths["train"], "train"), precomputed[:1])


@pytest.mark.parametrize("content", ["not json", "[]", '{"toy": 1}'])
async def test_a_malformed_cache_is_not_overwritten(tmp_path: Path, content: str) -> None:
    precomputed = await run(tmp_path, Retriever(), Generator())
    path = tmp_path / "rag_cache.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"rag_cache\.json: .*move the file away"):
        write_prepared(RagCacheConfig(tmp_path / "q", tmp_path / "test.parquet", "test"), precomputed)
    assert path.read_text() == content
    assert not (tmp_path / "test.parquet").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["documents.baseline_k=13"], "baseline_k=13; expected 0 to retrieve_k=12"),
        (["documents.retrieve_k=0"], "retrieve_k=0; expected at least 1"),
        (["output={questions}"], "is the file that questions names"),
        (["filters.drop_bare_golds=false"], "did you mean 'filter'"),
        (["limit=0"], "limit=0; expected at least 1, or null"),
    ],
)
def test_a_wrong_configuration_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    questions = tmp_path / "questions.parquet"
    write_questions(questions, QUESTIONS, "train")
    words = [f"questions={questions}", f"output={tmp_path / 'out.parquet'}", "split=train"]
    assert main([*words, *(word.format(questions=questions) for word in overrides)]) == 2
    assert message in capsys.readouterr().err


def test_a_file_without_questions_is_refused_before_anything_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_questions(tmp_path / "q.parquet", [], "train")
    assert main([f"questions={tmp_path / 'q.parquet'}", f"output={tmp_path / 'out.parquet'}", "split=train"]) == 1
    assert "q.parquet holds no question; expected at least one row" in capsys.readouterr().err
