"""Precompute naive RAG: what the frozen generator answers from the first documents found for each question.

    python -m data_preprocess.rag_cache questions=train.parquet output=prepared/train.parquet split=train

Written are the questions with their round-0 documents and their baseline (columns `initial_searched_results` and
`baseline`), and the published cache `{source: {question: {answer, score, em_score}}}`. Every finished question goes to
a journal first, so a run that was killed, or that met a dead service, goes on where it stopped.

Training sets leave out the questions that `data_preprocess.train_filter` names; test sets keep all. A downloaded cache
is used as it is by `data_preprocess.published_cache`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_preprocess.published_cache import CacheEntry, merged, read_cache
from data_preprocess.train_filter import TrainFilter, select
from generator_llms.client import GeneratorClient
from generator_llms.config import GeneratorConfig
from generator_llms.judge import judge_identity, open_judge
from verl.agent.protocols import Search
from verl.config import run_entry
from verl.errors import DataError
from verl.evaluation.collect import RunConfig
from verl.evaluation.collectors import NaiveRag
from verl.evaluation.identity import retriever_identity
from verl.evaluation.journal import Journal, Record, check_finished, question_key, work_through, write_whole
from verl.records import read_questions, write_questions
from verl.retrieval.client import RetrieverClient, RetrieverClientConfig
from verl.rewards.evidence import Answer, Judge, judge_answer
from verl.rewards.text import exact_match
from verl.typed import Decoder, encode
from verl.types import Baseline, Document, Question

logger = logging.getLogger(__name__)

_DECODER = Decoder(error=DataError)


@dataclass(frozen=True)
class BaselineConfig:
    """How many documents go where. The counts are on equal footing unless you say otherwise.

    Attributes:
        retrieve_k: documents retrieved and kept in the journal.
        baseline_k: the first so many are what naive RAG answers from.
        initial_k: the first so many are the searcher's round 0, in training and testing alike.
    """

    retrieve_k: int = 12
    baseline_k: int = 3
    initial_k: int = 3

    def __post_init__(self) -> None:
        if self.retrieve_k < 1:
            raise ValueError(f"retrieve_k={self.retrieve_k}; expected at least 1")
        for name in ("baseline_k", "initial_k"):
            if not 0 <= getattr(self, name) <= self.retrieve_k:
                raise ValueError(f"{name}={getattr(self, name)}; expected 0 to retrieve_k={self.retrieve_k}")


@dataclass(frozen=True)
class RagCacheConfig:
    """What to precompute.

    Attributes:
        questions: parquet of questions.
        output: parquet to write; its journal and error list lie beside it.
        split: goes to `extra_info.split`; the filter is applied to `train` only.
        cache_json: the published cache, entries of other questions are kept; `rag_cache.json` beside `output` if None.
        limit: take the first so many questions only.
        judge: let a model judge answers that match no gold literally.
        judge_generator: the model that judges; as published the generator itself if None.
    """

    questions: Path
    output: Path
    split: str
    cache_json: Path | None = None
    limit: int | None = None
    judge: bool = False
    judge_generator: GeneratorConfig | None = None
    documents: BaselineConfig = field(default_factory=BaselineConfig)
    filter: TrainFilter = field(default_factory=TrainFilter)
    retriever: RetrieverClientConfig = field(default_factory=RetrieverClientConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.output.resolve() == self.questions.resolve():
            raise ValueError(f"output={self.output} is the file that questions names; write to another one")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}; expected at least 1, or null for all questions")


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts of one run.

    Attributes:
        accuracy: of naive RAG, over all `asked` questions.
        dropped: questions that the filter left out, by reason.
    """

    asked: int
    accuracy: float
    exact: float
    written: int
    dropped: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Naive RAG for one question, as the journal keeps it."""

    documents: tuple[Document, ...]
    scores: tuple[float, ...]
    answer: str
    correct: bool
    exact: bool
    documents_used: int


class NaiveRagAnswers:
    """Retrieves for one question and answers from the first documents; concurrent calls share batches downstream."""

    def __init__(self, config: BaselineConfig, search: Search, answer: Answer, judge: Judge | None = None) -> None:
        self._retrieve = NaiveRag(search, config.retrieve_k)
        self._baseline_k = config.baseline_k
        self._answer = answer
        self._judge = judge

    async def __call__(self, question: Question) -> Record:
        """Return the journal's record.

        Raises:
            RetrieverError: the retriever failed.
            GeneratorError: the generator or the judge failed.
        """
        (turn,) = (await self._retrieve(question)).trajectory.turns
        assert turn.result is not None  # naive RAG always searches
        found = turn.result
        answered = await self._answer(question, found.documents[: self._baseline_k])
        verdict = await judge_answer(question, answered, self._judge)
        outcome = Outcome(
            documents=found.documents,
            scores=found.scores,
            answer=verdict.answer,
            correct=verdict.correct,
            exact=exact_match(verdict.answer, question.answers),
            documents_used=verdict.documents_used,
        )
        return {"id": question.id, **encode(outcome)}


async def precompute(
    questions: Sequence[Question],
    answers: NaiveRagAnswers,
    journal: Journal,
    errors_path: Path,
    config: BaselineConfig,
    run: RunConfig,
    title: str = "naive RAG",
) -> list[tuple[Question, Outcome]]:
    """Answer all questions by naive RAG, those of the journal from there.

    Returns:
        The questions with round-0 documents and baseline, in order, with what the journal holds of them.

    Raises:
        Unfinished: some questions failed; `errors_path` lists them, the others stay in the journal.
    """
    failures = await work_through(questions, answers, journal, title, run.concurrency, run.max_failures)
    check_finished(failures, len(questions), title, errors_path)
    outcomes = [_outcome(journal[question_key(question)]) for question in questions]
    return [(_with_baseline(q, outcome, config), outcome) for q, outcome in zip(questions, outcomes, strict=True)]


async def run(config: RagCacheConfig, prompt_fn: Callable[[Question], str] | None = None) -> Summary:
    """Precompute as configured and write parquet and cache.

    Args:
        prompt_fn: content of the `prompt` column; the bare question if None.

    Raises:
        Unfinished: some questions failed; nothing is written but journal and error list.
        DataError: no questions are left, or a file is malformed.
    """
    questions = read_questions(config.questions, config.limit)
    if not questions:
        raise DataError(f"{config.questions} holds no question; expected at least one row")
    journal_path = config.output.with_name(f"{config.output.stem}.journal.jsonl")
    errors_path = config.output.with_name(f"{config.output.stem}.errors.jsonl")
    async with AsyncExitStack() as stack:
        search = await stack.enter_async_context(RetrieverClient(config.retriever))
        generator = await stack.enter_async_context(GeneratorClient(config.generator))
        judge = await open_judge(config.judge_generator, generator, stack) if config.judge else None
        answers = NaiveRagAnswers(config.documents, search, generator.answer, judge)
        journal = stack.enter_context(Journal(journal_path, await _parameters(config, generator)))
        title = f"naive RAG, {config.split}"
        precomputed = await precompute(questions, answers, journal, errors_path, config.documents, config.run, title)
    return write_prepared(config, precomputed, prompt_fn)


def write_prepared(
    config: RagCacheConfig,
    precomputed: Sequence[tuple[Question, Outcome]],
    prompt_fn: Callable[[Question], str] | None = None,
) -> Summary:
    """Filter (the train split only), and write the parquet and the published cache.

    Raises:
        DataError: no question is left, or the cache that is there is malformed.
    """
    keep = config.filter if config.split == "train" else TrainFilter.none()
    kept, dropped = select((question for question, _ in precomputed), keep)
    if not kept:
        raise DataError(f"none of the {len(precomputed)} questions is left ({dropped}); switch a filter off")
    cache_path = config.cache_json or config.output.with_name("rag_cache.json")
    entries = ((question, CacheEntry(done.answer, done.correct, done.exact)) for question, done in precomputed)
    cache = merged(read_cache(cache_path) if cache_path.exists() else {}, entries)
    write_whole(cache_path, json.dumps(cache, ensure_ascii=False, indent=1))
    write_questions(config.output, kept, config.split, prompt_fn)
    asked = len(precomputed)
    accuracy = sum(outcome.correct for _, outcome in precomputed) / asked
    exact = sum(outcome.exact for _, outcome in precomputed) / asked
    logger.info(
        "%s: naive RAG is accurate on %.1f %% of %d questions; kept %d, dropped %s",
        config.output,
        100 * accuracy,
        asked,
        len(kept),
        ", ".join(f"{count} ({reason})" for reason, count in dropped.items()) or "none",
    )
    return Summary(asked, accuracy, exact, len(kept), dropped)


async def _parameters(config: RagCacheConfig, generator: GeneratorClient) -> dict[str, Any]:
    """Return what a journal's records depend on; `initial_k` is applied when the parquet is written."""
    asked = config.generator
    return {
        "retriever": await retriever_identity(config.retriever.url),
        "retrieve_k": config.documents.retrieve_k,
        "baseline_k": config.documents.baseline_k,
        "generator": await generator.ready(),
        "generator_identity": asked.model_identity,
        "asked": [asked.backend, asked.style, asked.prompt, asked.extra_body],
        "sampling": [asked.temperature, asked.top_p, asked.seed, asked.max_tokens, asked.max_prompt_tokens],
        "judge": judge_identity(config.judge, config.judge_generator, asked),
    }


def _outcome(record: Record) -> Outcome:
    fields = {name: value for name, value in record.items() if name not in ("key", "id")}
    return _DECODER.decode(Outcome, fields, record["id"])


def _with_baseline(question: Question, outcome: Outcome, config: BaselineConfig) -> Question:
    baseline = Baseline(outcome.documents[: config.baseline_k], outcome.answer, outcome.correct)
    return replace(question, initial_documents=outcome.documents[: config.initial_k], baseline=baseline)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return run_entry("precompute", RagCacheConfig, sys.argv[1:] if arguments is None else arguments, _main)


def _main(config: RagCacheConfig) -> None:
    asyncio.run(run(config))


if __name__ == "__main__":
    sys.exit(main())
