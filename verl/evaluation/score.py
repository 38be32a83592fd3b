"""Scores contexts: what the frozen generator answers from each question's documents, and how good that is.

Denominators. Every mean is over all questions that were asked: one whose generator or judge failed counts as not
accurate, so a failure can never raise a figure, and it is listed with its cause so that it cannot lower one unseen.
Passage metrics are over the questions that name gold passages; they and answer-in-context do not need the generator.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from verl.errors import DataError, GeneratorError
from verl.evaluation.passages import passage_metrics
from verl.evaluation.summary import ScoredQuestion, ScoreReport, ScoringConfig, summarise
from verl.rewards.evidence import Answer, Judge, Judging, judge_answer
from verl.rewards.recall import answer_in_context
from verl.rewards.text import exact_match, f1, precision, recall, span_match, strict_match, sub_span_match
from verl.types import Document, Question, Trajectory

Progress = Callable[[int, int], None]


async def score_contexts(
    questions: Sequence[Question],
    documents: Mapping[str, Sequence[Document]],
    answer: Answer,
    judge: Judge | None = None,
    config: ScoringConfig | None = None,
    progress: Progress | None = None,
) -> ScoreReport:
    """Answer every question from its documents and score the answers, all at once; `answer` bounds the concurrency.

    Args:
        documents: by question id, one entry for every question; it may be empty.
        progress: called with (done, total) after every question.

    Raises:
        DataError: no questions, a repeated id, or a question without an entry in `documents`.
        GeneratorError: more questions failed than `config.max_failed_fraction` allows.
    """
    check_questions(questions, documents)
    settings = config or ScoringConfig()
    done = 0

    async def score(question: Question) -> ScoredQuestion:
        nonlocal done
        row = await score_question(question, documents[question.id], answer, judge, settings.judging)
        done += 1
        if progress is not None:
            progress(done, len(questions))
        return row

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(score(question)) for question in questions]
    rows = [task.result() for task in tasks]
    _check_failures(rows, settings.max_failed_fraction)
    return summarise(rows, settings)


async def score_question(
    question: Question,
    documents: Sequence[Document],
    answer: Answer,
    judge: Judge | None = None,
    judging: Judging = "when_needed",
) -> ScoredQuestion:
    """Score one question; a failure of the generator or the judge becomes a row that says so."""
    row = passage_row(question, documents)
    try:
        verdict = await judge_answer(question, await answer(question, documents), judge, judging)
    except GeneratorError as error:
        return replace(row, failed=str(error) or repr(error))
    golds = question.answers
    return replace(
        row,
        answer=verdict.answer,
        accurate=verdict.correct,
        span=verdict.span,
        em=exact_match(verdict.answer, golds),
        f1=f1(verdict.answer, golds),
        sub_span=sub_span_match(verdict.answer, golds),
        strict=strict_match(verdict.answer, golds),
        precision=precision(verdict.answer, golds),
        token_recall=recall(verdict.answer, golds),
        judge=verdict.judge_parts(judging),
        documents_used=verdict.documents_used,
    )


def passage_row(question: Question, documents: Sequence[Document]) -> ScoredQuestion:
    """Return what the documents alone say about one question; nothing in it is about an answer."""
    passages = passage_metrics(question, documents)
    return ScoredQuestion(
        id=question.id,
        source=question.source,
        kind=question.kind,
        recall=passages and passages.recall,
        gold_precision=passages and passages.precision,
        ndcg=passages and passages.ndcg,
        reciprocal_rank=passages and passages.reciprocal_rank,
        answer_in_context=answer_in_context(question, documents),
        documents=len(documents),
    )


def with_trace(row: ScoredQuestion, trajectory: Trajectory, tokens: int, seconds: float) -> ScoredQuestion:
    """Return the row with what gathering its documents took, and with the searcher's own answer."""
    row = replace(row, searches=trajectory.searches, tokens=tokens, seconds=seconds)
    own, golds = trajectory.answer, trajectory.question.answers
    if own is None:
        return row
    return replace(
        row,
        own_answer=own,
        own_accurate=span_match(own, golds),
        own_em=exact_match(own, golds),
        own_f1=f1(own, golds),
    )


def check_questions(questions: Sequence[Question], documents: Mapping[str, Sequence[Document]]) -> None:
    """Check that there are questions, each once and each with an entry in `documents`; DataError if not."""
    if not questions:
        raise DataError("no questions to score; expected at least one")
    repeated = [id for id, times in Counter(question.id for question in questions).items() if times > 1]
    if repeated:
        raise DataError(f"question id {repeated[0]!r} occurs more than once; ids must be unique, drop the duplicates")
    missing = [question.id for question in questions if question.id not in documents]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(questions)} questions have no documents, first {missing[0]!r}; expected an entry "
            "for each, gather their contexts first (an empty list where nothing was found)"
        )


def _check_failures(rows: Sequence[ScoredQuestion], allowed: float) -> None:
    failed = Counter(row.failed for row in rows if row.failed)
    if failed.total() > allowed * len(rows):
        cause, times = failed.most_common(1)[0]
        raise GeneratorError(
            f"{failed.total()} of {len(rows)} questions could not be scored, above max_failed_fraction={allowed:g}; "
            f"most frequent cause ({times} times): {cause}"
        )
