"""Controls for what a method seems to gain over naive RAG: equal documents, random, gold and no documents, repeats.

    python -m verl.evaluation.controls output=outputs/controls contexts=outputs/contexts/s3 \\
        baseline=outputs/contexts/naive_rag baseline_documents=3 generator.base_url=http://127.0.0.1:8000/v1

Every condition of `verl.evaluation.control_contexts` is answered by the same generator and scored alike, and then the
method's contexts are answered several times over. Every finished answer is in a journal at once, so a run that was
killed goes on where it stopped. Written are `controls.json` and `controls.md`.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from generator_llms.client import GeneratorClient
from generator_llms.config import GeneratorConfig
from generator_llms.judge import judge_identity, open_judge
from generator_llms.prompts import shows_documents
from verl.config import run_entry
from verl.errors import DataError
from verl.evaluation.collect import Context, RunConfig, iter_contexts
from verl.evaluation.collectors import passages_of
from verl.evaluation.control_contexts import (
    ConditionName,
    Documents,
    Sources,
    build_condition,
    distinct_documents,
)
from verl.evaluation.control_report import ControlsReport, build_report, conditions_table, markdown_report
from verl.evaluation.journal import (
    Journal,
    Record,
    Unfinished,
    check_finished,
    question_key,
    work_through,
    write_failures,
    write_whole,
)
from verl.evaluation.repeats import Repeatability, summarise_repeats
from verl.evaluation.report import plain
from verl.evaluation.score import passage_row, score_question
from verl.evaluation.summary import ScoredQuestion, ScoreReport, ScoringConfig, summarise
from verl.retrieval.corpus import Corpus
from verl.rewards.evidence import Answer, Judge
from verl.typed import Decoder, encode
from verl.types import Question

_DECODER = Decoder(error=DataError)


@dataclass(frozen=True)
class RepeatConfig:
    """How repeatability is measured.

    Attributes:
        times: how often each context is asked; 0 leaves the measurement out.
        questions: so many questions, drawn with the seed; None takes all.
        temperature: of the repeats; None takes the generator's. Each repeat has the generator's seed plus its number.
    """

    times: int = 5
    questions: int | None = 200
    temperature: float | None = None

    def __post_init__(self) -> None:
        if self.times < 0 or self.times == 1:
            raise ValueError(f"times={self.times}; expected at least 2, or 0 to measure nothing")
        if self.questions is not None and self.questions < 1:
            raise ValueError(f"questions={self.questions}; expected at least 1, or null for all")


@dataclass(frozen=True)
class ControlsConfig:
    """What to control.

    Attributes:
        output: folder of the report and the journals.
        contexts: folder that `s3 collect` wrote for the method.
        method: its name in the report.
        baseline: folder that `s3 collect method=naive_rag` wrote for the same questions, with at least as many
            documents as the method shows (topk), so that `baseline_cut` has them; None takes the questions' baseline
            column.
        baseline_documents: the baseline answers from the first so many; None from all.
        corpus: jsonl corpus, to look gold passages up in; without it they are those that some context holds.
        random_from: where random documents come from: what was found for other questions, or the corpus.
        conditions: which conditions are scored; see `verl.evaluation.control_contexts.MEANINGS`.
        limit: take the first so many questions, in the order of their ids.
        seed: of what is drawn.
        judge: let a model judge answers that match no gold literally.
        judge_generator: the model that judges; as published the generator itself if None.
    """

    output: Path
    contexts: Path
    method: str = "method"
    baseline: Path | None = None
    baseline_documents: int | None = None
    corpus: Path | None = None
    random_from: Literal["contexts", "corpus"] = "contexts"
    conditions: tuple[ConditionName, ...] = get_args(ConditionName)
    limit: int | None = None
    seed: int = 0
    judge: bool = False
    judge_generator: GeneratorConfig | None = None
    repeat: RepeatConfig = field(default_factory=RepeatConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.random_from == "corpus" and self.corpus is None:
            raise ValueError("random_from=corpus needs a corpus; set corpus=PATH, or random_from=contexts")
        for name in ("baseline_documents", "limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1, or null for all")
        if len(set(self.conditions)) < len(self.conditions):
            raise ValueError(f"conditions={', '.join(self.conditions)} names one twice; name each once")
        if not self.conditions and not self.repeat.times:
            raise ValueError("conditions is empty and repeat.times is 0; there is nothing to do")
        if not shows_documents(self.generator.prompt):
            raise ValueError(f"generator.prompt={self.generator.prompt} shows no document; choose context, for example")
        if self.repeat.times and self.generator.cache_mode == "replay":
            raise ValueError("generator.cache_mode=replay cannot ask anything again; set repeat.times=0")


@dataclass(frozen=True, slots=True)
class Asking:
    """A generator with its judge, and what the journals of its answers depend on."""

    answer: Answer
    judge: Judge | None
    parameters: Mapping[str, Any]


async def score_documents(
    name: str,
    questions: Sequence[Question],
    documents: Mapping[str, Documents],
    asking: Asking,
    folder: Path,
    config: ControlsConfig,
) -> ScoreReport:
    """Score the questions that `documents` has an entry for, skipping the answers that `folder` holds already.

    Args:
        name: of the progress bar, the journal and the error list.

    Raises:
        Unfinished: more questions failed than `config.scoring` allows; the others are kept.
        DataError: `folder` holds answers of another generator.
    """
    # As round-0 documents they are part of the journal's key, so an answer from other documents is never taken up.
    given = [replace(q, initial_documents=documents[q.id]) for q in questions if q.id in documents]

    async def work(question: Question) -> Record:
        row = await score_question(question, question.initial_documents, asking.answer, asking.judge)
        if row.failed:
            raise Unfinished(row.failed)
        return {"row": encode(row)}

    errors = folder / f"{name}.errors.jsonl"
    with Journal(folder / f"{name}.jsonl", {"name": name, **asking.parameters}) as journal:
        failures = await work_through(given, work, journal, name, config.run.concurrency, config.run.max_failures)
        if len(failures) > config.scoring.max_failed_fraction * len(given):
            check_finished(failures, len(given), name, errors)
        write_failures(errors, failures)
        causes = {failure.id: failure.cause for failure in failures}
        rows = [
            _failed_row(question, causes[question.id])
            if question.id in causes
            else _DECODER.decode(ScoredQuestion, journal[question_key(question)]["row"], question.id)
            for question in given
        ]
    return summarise(rows, config.scoring)


def _failed_row(question: Question, cause: str) -> ScoredQuestion:
    return replace(passage_row(question, question.initial_documents), failed=cause)


async def score_repeat(
    number: int,
    questions: Sequence[Question],
    documents: Mapping[str, Documents],
    asking: Asking,
    folder: Path,
    config: ControlsConfig,
) -> ScoreReport:
    """Score the sample of questions that every repeat is about. Raises as `score_documents`."""
    ids = sorted(question.id for question in questions)
    chosen = random.Random(config.seed).sample(ids, min(len(ids), config.repeat.questions or len(ids)))
    sample = {id: documents[id] for id in chosen}
    return await score_documents(f"repeat_{number}", questions, sample, asking, folder, config)


def read_sources(config: ControlsConfig) -> tuple[list[Question], Sources]:
    """Read the questions, in the order of their ids, and the documents of method, baseline and pool.

    Raises:
        DataError: no contexts, contexts of other questions, or a malformed file.
    """
    contexts = sorted(iter_contexts(config.contexts), key=lambda context: context.trajectory.question.id)
    if not contexts:
        raise DataError(f"{config.contexts} holds no context; run `s3 collect` to its end first")
    questions = [context.trajectory.question for context in contexts]
    repeated = [id for id, times in Counter(question.id for question in questions).items() if times > 1]
    if repeated:
        raise DataError(f"{config.contexts} holds {repeated[0]!r} more than once; collect into an empty folder")
    method, ranked = _by_question(contexts), _ranked(config, questions)
    seen = distinct_documents((*method.values(), *ranked.values()))
    corpus = Corpus.open(config.corpus) if config.corpus else None
    known: Mapping[str, Documents] = {}
    if "gold" in config.conditions and any(question.gold_titles for question in questions):
        known = passages_of(questions, seen if corpus is None else corpus.documents())
    pool = corpus if corpus is not None and config.random_from == "corpus" else seen
    sources = Sources(method, ranked, config.baseline_documents, pool, known, config.seed)
    return questions[: config.limit], sources


def _ranked(config: ControlsConfig, questions: Sequence[Question]) -> dict[str, Documents]:
    """Return what naive RAG ranked for the questions of which it is known."""
    if config.baseline is None:
        return {question.id: question.baseline.documents for question in questions if question.baseline is not None}
    contexts = list(iter_contexts(config.baseline))
    texts = {question.id: question.text for question in questions}
    for context in contexts:
        found = context.trajectory.question
        if texts.get(found.id, found.text) != found.text:
            raise DataError(
                f"{found.id!r} is {found.text!r} in {config.baseline} and {texts[found.id]!r} in {config.contexts}; "
                "expected contexts of the same questions, collect the baseline for those of the method"
            )
    return _by_question(contexts)


def _by_question(contexts: Iterable[Context]) -> dict[str, Documents]:
    return {context.trajectory.question.id: context.trajectory.documents for context in contexts}


async def run(config: ControlsConfig) -> ControlsReport:
    """Run the controls as configured and write the report.

    Raises:
        Unfinished: too many questions failed; what is finished is kept.
        DataError: contexts are missing or malformed, or the output folder holds answers of another generator.
    """
    questions, sources = read_sources(config)
    conditions = [build_condition(name, questions, sources) for name in config.conditions]
    folder = config.output / "answers"
    scored: dict[str, ScoreReport] = {}
    async with AsyncExitStack() as stack:
        asking = await _asking(config.generator, config, stack)
        for name, documents in ((condition.name, condition.documents) for condition in conditions):
            if documents:
                scored[name] = await score_documents(name, questions, documents, asking, folder, config)
    repeatability = await _repeats(config, questions, sources, folder)
    report = build_report(config.method, config.seed, conditions, scored, repeatability, config.scoring)
    write_whole(config.output / "controls.json", json.dumps(encode(report), indent=2, allow_nan=False) + "\n")
    write_whole(config.output / "controls.md", markdown_report(report))
    return report


async def _asking(asked: GeneratorConfig, config: ControlsConfig, stack: AsyncExitStack) -> Asking:
    client = await stack.enter_async_context(GeneratorClient(asked))
    judge = await open_judge(config.judge_generator, client, stack) if config.judge else None
    parameters = {
        "generator": await client.ready(),
        "generator_identity": asked.model_identity,
        "asked": [asked.backend, asked.style, asked.prompt, asked.extra_body],
        "prompt": asked.prompt,
        "sampling": [asked.temperature, asked.top_p, asked.seed, asked.max_tokens, asked.max_prompt_tokens],
        "judge": judge_identity(config.judge, config.judge_generator, asked),
    }
    return Asking(client.answer, judge, parameters)


async def _repeats(
    config: ControlsConfig, questions: Sequence[Question], sources: Sources, folder: Path
) -> Repeatability | None:
    if not config.repeat.times:
        return None
    asked, first = config.generator, config.generator.seed
    temperature = asked.temperature if config.repeat.temperature is None else config.repeat.temperature
    seeds = [None if first is None else first + number for number in range(config.repeat.times)]
    reports: list[ScoreReport] = []
    for number, seed in enumerate(seeds):
        # Without the cache, or the first answer would come back each time.
        uncached = replace(asked, cache_mode="off", temperature=temperature, seed=seed)
        async with AsyncExitStack() as stack:
            asking = await _asking(uncached, config, stack)
            reports.append(await score_repeat(number, questions, sources.method, asking, folder, config))
    return summarise_repeats(reports, temperature, seeds, config.scoring)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return run_entry("controls", ControlsConfig, sys.argv[1:] if arguments is None else arguments, _main)


def _main(config: ControlsConfig) -> None:
    report = asyncio.run(run(config))
    sys.stdout.write("\n" + plain(conditions_table(report)))


if __name__ == "__main__":
    sys.exit(main())
