"""Examples to start a text-to-SQL policy from: gold statements, each with the reasoning that leads to it.

    python -m data_preprocess.sql_cold_start questions=data/spider/train.parquet output=data/spider/cold_start.jsonl \
        sql.databases=spider_data generator.base_url=https://api.openai.com/v1 generator.model=gpt-4o
    python -m data_preprocess.sql_cold_start ... annotator=none

A model explains the gold statement of every question of `data_preprocess.sql`; the example is the prompt that training
uses, and `<think>explanation</think><answer>{"sql": ...}</answer>`. With `annotator=none` nobody is asked and nothing
is explained: prompt and answer are those of the protocol without reasoning. The rows, `{"messages": [...]}`, are what
`verl.trainer.main_sft` reads.

Left out, and counted by reason, is a question whose gold does not run or returns nothing, and one whose explanation
stays unusable: blank, too long, with tags of the protocol, or one that speaks of having been given the statement. Every
finished question goes to a journal beside the output, so a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from generator_llms.client import GeneratorClient
from generator_llms.config import GeneratorConfig
from verl.agent.grammar.deepretrieval import DeepRetrievalConfig, DeepRetrievalGrammar
from verl.agent.grammar.render import neutralise
from verl.config import run_entry
from verl.errors import DataError
from verl.evaluation.collect import RunConfig
from verl.evaluation.journal import Journal, Record, check_finished, question_key, work_through, write_whole
from verl.records import read_questions
from verl.retrieval.engines.sql import SqlEngine
from verl.rewards.sql import ExecutionAccuracy
from verl.rewards.sql_config import SqlConfig
from verl.rewards.sql_text import one_line
from verl.types import Question

logger = logging.getLogger(__name__)

Annotator = Literal["llm", "none"]

_TASK = (
    "Below are the schema of a SQLite database, a question, and the correct SQL statement. Write down the reasoning of "
    "an expert who reads the schema and the question and arrives at this statement: which tables and columns matter, "
    "how they are joined, and which conditions, groups and orders the question asks for. Be brief. Write it as if the "
    "statement were not known yet: do not say that it was given. Write nothing but the reasoning, inside <think> and "
    "</think>."
)
_THINK = re.compile(r"<think>(.*)</think>", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")
_GIVEN_AWAY = re.compile(
    r"\b(?:the|this) (?:given|provided|correct|gold|reference) (?:sql|statement|query)\b"
    r"|\b(?:sql|statement|query) (?:that )?(?:was|is|were) (?:given|provided)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class ColdStartConfig:
    """What to write.

    Attributes:
        questions: parquet of `data_preprocess.sql`, the training split.
        output: jsonl to write; its journal and error list lie beside it.
        annotator: `llm` asks `generator` for explanations, `none` writes examples without any.
        prompt: as of the protocol; `compact` is for tiny models.
        limit: take the first so many questions only.
        draws: how often an explanation is asked for that is unusable.
        max_words: of an explanation.
        sql: databases and limits.
    """

    questions: Path
    output: Path
    sql: SqlConfig
    annotator: Annotator = "llm"
    prompt: Literal["published", "compact"] = "published"
    limit: int | None = None
    draws: int = 3
    max_words: int = 300
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        for name in ("draws", "max_words", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}; expected at least 1")
        if self.output.resolve() == self.questions.resolve():
            raise ValueError(f"output={self.output} is the file that questions names; write to another one")


@dataclass(frozen=True, slots=True)
class Summary:
    """How many examples were written, and how many questions were left out and why."""

    written: int
    rejected: dict[str, int]


class Annotations:
    """Makes the example of one question.

    Args:
        generator: explains; None where nothing is to be explained.
    """

    def __init__(self, config: ColdStartConfig, engine: SqlEngine, generator: GeneratorClient | None) -> None:
        self._config = config
        self._engine = engine
        self._generator = generator
        reasoning = generator is not None
        self._grammar = DeepRetrievalGrammar(DeepRetrievalConfig(task="sql", reasoning=reasoning, prompt=config.prompt))

    async def __call__(self, question: Question) -> Record:
        """Return the example, or why there is none, as a journal's record.

        Raises:
            GeneratorError: the annotator could not be asked.
            RetrieverError: no process for SQL can be started.
        """
        sql = one_line(question.extra["sql"])
        result = await self._engine(question, sql)
        if result.error:
            return _rejected(question, f"gold fails: {result.error}")
        if not result.rows:
            return _rejected(question, "gold returns nothing")
        answer = f"<answer>{json.dumps({'sql': sql}, ensure_ascii=False)}</answer>"
        if self._generator is None:
            return self._checked(question, sql, answer)
        reason = ""
        for draw in range(self._config.draws):
            reply = await self._generator.complete(_conversation(question, sql), draw=draw)
            explanation = _THINK.search(reply.text)
            text = (explanation[1] if explanation else reply.text).strip()
            reason = self._fault(text) if reply.finish != "length" else "explanation is cut off"
            if not reason:
                return self._checked(question, sql, f"<think>\n{text}\n</think>\n{answer}")
        return _rejected(question, reason)

    def messages(self, question: Question, said: str) -> list[dict[str, str]]:
        """Return an example as a conversation."""
        return [*self._grammar.prompt_messages(question), {"role": "assistant", "content": said}]

    def _fault(self, explanation: str) -> str:
        if not explanation:
            return "explanation is blank"
        if len(explanation.split()) > self._config.max_words:
            return "explanation is too long"
        if _TAG.search(explanation):
            return "explanation holds tags"
        return "explanation speaks of a given statement" if _GIVEN_AWAY.search(explanation) else ""

    def _checked(self, question: Question, sql: str, said: str) -> Record:
        """Return the example if the protocol reads from it what it is meant to say."""
        if self._grammar.parse(question, (), said).answer != sql:
            return _rejected(question, "example cannot be read back")
        return {"id": question.id, "said": said}


def _conversation(question: Question, sql: str) -> list[dict[str, str]]:
    content = f"{_TASK}\n\n{neutralise(question.text)}\n\nCorrect SQL statement:\n{sql}"
    return [{"role": "user", "content": content}]


def _rejected(question: Question, reason: str) -> Record:
    return {"id": question.id, "rejected": reason}


async def run(config: ColdStartConfig) -> Summary:
    """Write the examples, going on where an earlier run stopped.

    Raises:
        DataError: no questions, one without a gold, or none is left.
        Unfinished: the annotator failed for some; they are listed, and nothing is written.
    """
    questions = read_questions(config.questions, config.limit)
    if not questions:
        raise DataError(f"{config.questions} holds no question; expected at least one row")
    ExecutionAccuracy(dataset="spider").validate(questions)
    journal_path = config.output.with_name(f"{config.output.stem}.journal.jsonl")
    errors_path = config.output.with_name(f"{config.output.stem}.errors.jsonl")
    async with AsyncExitStack() as stack:
        engine = SqlEngine(config.sql)
        stack.push_async_callback(engine.aclose)
        asking = config.annotator == "llm"
        generator = await stack.enter_async_context(GeneratorClient(config.generator)) if asking else None
        annotate = Annotations(config, engine, generator)
        journal = stack.enter_context(Journal(journal_path, await _parameters(config, generator)))
        concurrency, most = config.run.concurrency, config.run.max_failures
        failures = await work_through(questions, annotate, journal, "cold start", concurrency, most)
        check_finished(failures, len(questions), "cold start", errors_path)
        records = [(question, journal[question_key(question)]) for question in questions]
    return _write(config, annotate, records)


def _write(config: ColdStartConfig, annotate: Annotations, records: Sequence[tuple[Question, Record]]) -> Summary:
    rejected = Counter(record["rejected"] for _, record in records if "rejected" in record)
    rows = [{"messages": annotate.messages(q, record["said"])} for q, record in records if "said" in record]
    if not rows:
        raise DataError(f"none of the {len(records)} questions is left ({dict(rejected)}); check sql.databases")
    write_whole(config.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for reason, count in rejected.most_common():
        logger.info("left out %d of %d questions: %s", count, len(records), reason)
    logger.info("wrote %d examples to %s", len(rows), config.output)
    return Summary(len(rows), dict(rejected))


async def _parameters(config: ColdStartConfig, generator: GeneratorClient | None) -> dict[str, Any]:
    """Return what a journal's records depend on."""
    asked = config.generator
    return {
        "annotator": await generator.ready() if generator else "none",
        "sampling": [asked.temperature, asked.top_p, asked.seed, asked.max_tokens] if generator else [],
        "task": _TASK if generator else "",
        "prompt": config.prompt,
        "bounds": [config.draws, config.max_words],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return run_entry("sql_cold_start", ColdStartConfig, sys.argv[1:] if arguments is None else arguments, _main)


def _main(config: ColdStartConfig) -> None:
    asyncio.run(run(config))


if __name__ == "__main__":
    sys.exit(main())
