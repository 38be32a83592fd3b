"""Build ExSearch's warm-up data: gold supporting facts become trajectories with real retrieval.

    python -m data_preprocess.warmup source.path=hotpot_train_v1.1.json output=data/warmup.jsonl limit=1000

The sub-queries of a question come from what its set ships (`decomposition=dataset`; how, says
`data_preprocess.evidence.decompose`) or from an OpenAI-compatible annotator (`decomposition=annotator`). Each is sent
to the retriever, and each fact must stand in a passage that is shown for it. Written are rows
`{"messages", "query_id"}` in the published layout, with `search.select` also the choices of documents
(`"kind": "rank"`). Beside `output` lie `*.rejected.jsonl`, every question without a trajectory and why, and
`*.summary.json`: rows are written or rejected, always. A run that was killed, or that met a dead service, goes on where
it stopped.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_preprocess.evidence.annotate import PROMPT, annotate
from data_preprocess.evidence.decompose import Plan, decompose, world_plan
from data_preprocess.evidence.facts import facts_of
from data_preprocess.finished import file_state
from data_preprocess.readers.hub import PREFIX
from data_preprocess.readers.source import KNOWN, Item, SourceConfig, locate, read_source, with_split
from data_preprocess.warmup_build import Builder, Built
from generator_llms.client import GeneratorClient
from generator_llms.config import GeneratorConfig
from verl.agent.grammar.base import Message
from verl.agent.grammar.exsearch import ExSearchConfig, ExSearchGrammar
from verl.config import run_entry
from verl.errors import ConfigError, DataError
from verl.evaluation.collect import RunConfig
from verl.evaluation.identity import retriever_identity
from verl.evaluation.journal import (
    Journal,
    Record,
    check_finished,
    fingerprint,
    question_key,
    work_through,
    write_whole,
)
from verl.retrieval.client import RetrieverClient, RetrieverClientConfig
from verl.typed import encode
from verl.types import Document, Question

logger = logging.getLogger(__name__)

MALFORMED_ROW = "malformed row"
REPEATED_ID = "repeated id"


@dataclass(frozen=True)
class WarmupConfig:
    """What to build.

    Attributes:
        output: jsonl of the rows.
        source: the questions with their supporting facts, in a published format or a parquet of the embedded world;
            its split, for ids, is `train` if it has none.
        decomposition: where sub-queries come from: what the set ships, the annotator, or "world" for a question that
            spells its chain out.
        search: the protocol that the trajectories follow; `max_turns` bounds their searches.
        min_overlap: see `data_preprocess.warmup_build.Builder`.
        limit: use so many questions only.
        seed: which ones, drawn at random; null takes the first.
        tries: replies asked of the annotator for one question, at most.
        annotator_tokens: longest reply.
        shuffle: write trajectories and choices mixed, drawn by `seed` (0 if null), rather than in the questions' order.
    """

    output: Path
    source: SourceConfig = field(default_factory=SourceConfig)
    decomposition: Literal["dataset", "annotator", "world"] = "dataset"
    search: ExSearchConfig = field(default_factory=ExSearchConfig)
    min_overlap: float = 0.5
    limit: int | None = None
    seed: int | None = 0
    tries: int = 3
    annotator_tokens: int = 1000
    shuffle: bool = False
    annotator: GeneratorConfig = field(default_factory=GeneratorConfig)
    retriever: RetrieverClientConfig = field(default_factory=RetrieverClientConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if not 0 < self.min_overlap <= 1:
            raise ValueError(f"min_overlap={self.min_overlap}; expected a share above 0 and up to 1")
        for name in ("limit", "tries", "annotator_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}; expected at least 1")


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts of one run; `rows` = `trajectories` + all of `rejected`."""

    rows: int
    trajectories: int
    rank_pairs: int
    searches: int
    rejected: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Cases:
    """The questions that are worked on, with their rows, and the rows that hold none."""

    items: Mapping[str, Item]
    passages: Mapping[str, Document]
    faults: Sequence[Mapping[str, str]]

    @property
    def questions(self) -> list[Question]:
        """The questions, in order."""
        return [item.question for item in self.items.values() if item.question is not None]


def read_cases(config: WarmupConfig) -> Cases:
    """Read the source, and draw `limit` of its rows.

    Raises:
        DataError: a file cannot be read, or holds no row.
    """
    source = with_split(config.source, "train")
    passages: dict[str, Document] = {}
    if source.passages is not None:
        for item in read_source("passages", SourceConfig(path=str(source.passages))):
            passages.update((document.id, document) for document in item.documents)
    first = config.limit if config.seed is None else None
    rows = list(read_source(_key(source), source, limit=first))
    if config.seed is not None and config.limit is not None and config.limit < len(rows):
        chosen = sorted(random.Random(config.seed).sample(range(len(rows)), config.limit))
        rows = [rows[index] for index in chosen]
    if not rows:
        raise DataError(f"{locate(_key(source), source)} holds no row; expected questions with supporting facts")
    items: dict[str, Item] = {}
    faults: list[dict[str, str]] = []
    for item in rows:
        if item.question is None:
            faults.append({"id": item.place, "reason": MALFORMED_ROW, "detail": item.fault or "it asks nothing"})
        elif item.question.id in items:
            faults.append({"id": item.place, "reason": REPEATED_ID, "detail": item.question.id})
        else:
            items[item.question.id] = item
    return Cases(items, passages, faults)


def _key(source: SourceConfig) -> str:
    """Return the name that questions are known by: the set's own, or its file's."""
    return source.source or (Path(source.path).stem if source.path else "source")


class Planner:
    """Finds the searches for a row's question, as configured."""

    def __init__(self, config: WarmupConfig, cases: Cases, client: GeneratorClient | None) -> None:
        self._config = config
        self._cases = cases
        self._client = client

    async def __call__(self, question: Question) -> Plan:
        """Return the plan; raises GeneratorError if the annotator is away."""
        item = self._cases.items[question.id]
        if self._config.decomposition == "world":
            return world_plan(question)
        if self._config.decomposition == "dataset":
            return decompose(item, self._cases.passages)
        facts = facts_of(item, self._cases.passages)
        facts = facts or tuple(fact for hop in world_plan(question).hops for fact in hop.facts)
        return await annotate(question, facts, self._ask, self._config.tries)

    async def _ask(self, messages: Sequence[Message], attempt: int) -> str:
        assert self._client is not None  # opened for this decomposition
        bound = self._config.annotator_tokens
        return (await self._client.complete(messages, max_tokens=bound, draw=attempt)).text


async def build(config: WarmupConfig) -> Summary:
    """Build as configured.

    Raises:
        Unfinished: a service failed for some questions; the others are kept for the next run.
        DataError: nothing to read, or no trajectory is left; the rejections are written all the same.
    """
    cases = await asyncio.to_thread(read_cases, config)
    async with AsyncExitStack() as stack:
        search = await stack.enter_async_context(RetrieverClient(config.retriever))
        client = None
        if config.decomposition == "annotator":
            client = await stack.enter_async_context(GeneratorClient(config.annotator))
        planner = Planner(config, cases, client)
        builder = Builder(ExSearchGrammar(config.search), search, config.min_overlap)

        async def work(question: Question) -> Record:
            return {"id": question.id, **encode(await builder(question, await planner(question)))}

        journal = stack.enter_context(Journal(_beside(config, "journal.jsonl"), await _parameters(config, client)))
        questions = cases.questions
        run = config.run
        failures = await work_through(questions, work, journal, "warm-up", run.concurrency, run.max_failures)
        check_finished(failures, len(questions), "warm-up", _beside(config, "errors.jsonl"))
        records = [journal[question_key(question)] for question in questions]
    return write(config, records, cases.faults)


def write(config: WarmupConfig, records: Sequence[Record], faults: Sequence[Mapping[str, str]]) -> Summary:
    """Write rows, rejections and summary.

    Raises:
        DataError: no trajectory is left.
    """
    rows: list[dict[str, Any]] = []
    rejected = [*faults]
    trajectories = searches = 0
    for record in records:
        built = Built(**{name: value for name, value in record.items() if name not in ("key", "id")})
        if built.reason:
            rejected.append({"id": record["id"], "reason": built.reason, "detail": built.detail})
            continue
        trajectories += 1
        searches += len(built.messages) // 2 - 2
        rows.append({"messages": built.messages, "query_id": record["id"], "documents": built.documents})
        rows += [{"messages": pair, "query_id": record["id"], "kind": "rank"} for pair in built.ranks]
    counts = Counter(entry["reason"] for entry in rejected)
    summary = Summary(len(records) + len(faults), trajectories, len(rows) - trajectories, searches, dict(counts))
    if config.shuffle:
        random.Random(config.seed or 0).shuffle(rows)
    write_whole(_beside(config, "rejected.jsonl"), _lines(rejected))
    write_whole(_beside(config, "summary.json"), json.dumps(encode(summary), indent=1) + "\n")
    if not rows:
        config.output.unlink(missing_ok=True)
        raise DataError(
            f"none of the {summary.rows} rows gave a trajectory ({summary_line(summary)}); "
            f"{_beside(config, 'rejected.jsonl')} says why for each"
        )
    write_whole(config.output, _lines(rows))
    logger.info("%s: %s", config.output, summary_line(summary))
    return summary


def summary_line(summary: Summary) -> str:
    """Say what became of the rows."""
    reasons = ", ".join(f"{count} ({reason})" for reason, count in sorted(summary.rejected.items())) or "none"
    return (
        f"{summary.trajectories} trajectories with {summary.searches} searches and {summary.rank_pairs} choices of "
        f"documents out of {summary.rows} rows; rejected: {reasons}"
    )


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _beside(config: WarmupConfig, ending: str) -> Path:
    return config.output.with_name(f"{config.output.stem}.{ending}")


async def _parameters(config: WarmupConfig, client: GeneratorClient | None) -> dict[str, Any]:
    """Return what a journal's records depend on; which questions are drawn, and their order, are not among it."""
    source = with_split(config.source, "train")
    path = locate(_key(source), source)
    files = [Path(path)] if not path.startswith(PREFIX) else []
    files += [source.passages] if source.passages is not None else []
    asked = config.annotator
    return {
        "source": [path, *(file_state(file) for file in files)],
        "retriever": await retriever_identity(config.retriever.url),
        "search": config.search,
        "min_overlap": config.min_overlap,
        "decomposition": config.decomposition,
        "annotator": client and [await client.ready(), asked.model_identity, fingerprint(PROMPT.template)],
        "annotator_sampling": client
        and [asked.temperature, asked.top_p, asked.seed, config.annotator_tokens, config.tries],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return run_entry("warmup", WarmupConfig, sys.argv[1:] if arguments is None else arguments, _main)


def _main(config: WarmupConfig) -> None:
    if config.source.path is None and config.source.source is None:
        raise ConfigError(f"source.path is missing; name a file, or a known set in source.source ({', '.join(KNOWN)})")
    sys.stdout.write(summary_line(asyncio.run(build(config))) + "\n")


if __name__ == "__main__":
    sys.exit(main())
