"""Gather contexts: every question's documents by one method, as jsonl with its whole trace and as the published JSON.

    python -m verl.evaluation.collect method=naive_rag questions=test.parquet output=outputs/contexts/naive_rag

Contexts stream into `contexts.jsonl`; a run that was killed goes on where it stopped when it is started again. Every
question ends up there or in `errors.jsonl` with the cause.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from generator_llms.client import GeneratorClient
from generator_llms.config import GeneratorConfig
from verl.agent.chat import EngineChat
from verl.agent.grammar.base import Message
from verl.agent.grammar.deepretrieval import DeepRetrievalConfig
from verl.agent.grammar.registry import SearchConfig, build_grammar
from verl.agent.grammar.s3 import S3Config
from verl.agent.protocols import Sampling
from verl.config import run_entry
from verl.errors import ConfigError, DataError
from verl.evaluation.collectors import Collector, Direct, NaiveRag, Oracle, Searcher, passages_of, raw_query
from verl.evaluation.identity import check_tokenizer, model_identity, retriever_identity
from verl.evaluation.journal import (
    Journal,
    Record,
    Unfinished,
    check_finished,
    question_key,
    work_through,
    write_whole,
)
from verl.evaluation.remote_engine import RemoteConfig, RemoteEngine, Transcript
from verl.evaluation.scripted import TitleOracle
from verl.records import read_questions
from verl.retrieval.client import RetrieverClient, RetrieverClientConfig
from verl.retrieval.corpus import Corpus
from verl.retrieval.engines.choice import open_search
from verl.retrieval.engines.literature import LiteratureConfig, LiteratureSearch
from verl.trajectories import trajectory_from_record, trajectory_record
from verl.typed import nearest
from verl.types import Document, Question, Role, Stop, Trajectory
from verl.workers.engines import EngineConfig, RolloutEngine, create_engine

logger = logging.getLogger(__name__)
_TIMING = "timing.json"


@dataclass(frozen=True, slots=True)
class Context:
    """What one method gathered for one question.

    Attributes:
        trajectory: the trace, with `documents` for the generator; read from a file it has no token ids.
        response: what the policy wrote and was answered, as text.
        tokens: tokens that the policy sampled.
        seconds: from start to end, other questions running beside it.
    """

    trajectory: Trajectory
    response: str
    tokens: int
    seconds: float


@dataclass(frozen=True)
class RunConfig:
    """How many questions are worked on.

    Attributes:
        concurrency: questions in flight.
        max_failures: failed questions after which a run gives up.
    """

    concurrency: int = 64
    max_failures: int = 32

    def __post_init__(self) -> None:
        for name in ("concurrency", "max_failures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")


async def collect(
    questions: Sequence[Question],
    collector: Collector,
    folder: Path,
    parameters: Mapping[str, Any],
    title: str,
    config: RunConfig | None = None,
) -> list[Context]:
    """Gather the contexts of all questions into `folder`, skipping those that it holds already.

    Args:
        parameters: everything that the contexts depend on besides the questions.
        title: of the progress bar.

    Returns:
        One context per question, in order.

    Raises:
        Unfinished: some questions failed; `errors.jsonl` lists them, the others are kept.
        DataError: `folder` holds contexts of other parameters.
    """
    config = config or RunConfig()

    async def work(question: Question) -> Record:
        return await _gather_one(collector, question)

    started = time.perf_counter()
    with Journal(folder / "contexts.jsonl", parameters) as journal:
        earlier = collect_seconds(folder) if len(journal) else 0.0
        failures = await work_through(questions, work, journal, title, config.concurrency, config.max_failures)
        write_whole(folder / _TIMING, json.dumps({"seconds": round(earlier + time.perf_counter() - started, 3)}))
        check_finished(failures, len(questions), title, folder / "errors.jsonl")
        contexts = [_context(journal[question_key(question)]) for question in questions]
    write_published(contexts, folder)
    return contexts


def collect_seconds(folder: Path) -> float:
    """Return the wall-clock seconds that collecting into `folder` took, over all runs that were not killed."""
    path = folder / _TIMING
    return float(json.loads(path.read_text())["seconds"]) if path.is_file() else 0.0


def iter_contexts(folder: Path) -> Iterator[Context]:
    """Stream the contexts that `collect` wrote.

    Raises:
        DataError: there are none, or a line is malformed (names file and line, counted from 1).
    """
    path = folder / "contexts.jsonl"
    if not path.is_file():
        raise DataError(f"{folder} holds no contexts.jsonl; expected the output folder of `s3 collect`")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                if number > 1:
                    yield _context(record)
            except (json.JSONDecodeError, KeyError, DataError) as cause:
                raise DataError(
                    f"{path}:{number}: {cause}; run `s3 collect` again, it repairs a cut-off end"
                ) from cause


def write_published(contexts: Iterable[Context], folder: Path) -> list[Path]:
    """Write `{source}_output_sequences.json`, {question: {golden_answers, context_with_info, response_str}}.

    The published layout is keyed by the question's text: of questions that are worded alike it keeps the last.
    """
    by_source: dict[str, dict[str, Any]] = {}
    counts: Counter[str] = Counter()
    for context in contexts:
        question = context.trajectory.question
        counts[question.source] += 1
        by_source.setdefault(question.source, {})[question.text] = {
            "golden_answers": list(question.answers),
            "context_with_info": context_with_info(context.trajectory.documents),
            "response_str": context.response,
        }
    paths = []
    for source, entries in by_source.items():
        if len(entries) < counts[source]:
            logger.warning("%s: %d questions share their wording with another", source, counts[source] - len(entries))
        paths.append(folder / f"{source.replace('/', '_')}_output_sequences.json")
        write_whole(paths[-1], json.dumps(entries, ensure_ascii=False, indent=2))
    return paths


def context_with_info(documents: Sequence[Document]) -> str:
    """Render documents as the published context files do."""
    return "".join(f"Doc {n} (Title: {doc.title})\n{doc.text}\n\n" for n, doc in enumerate(documents, start=1))


async def _gather_one(collector: Collector, question: Question) -> Record:
    started = time.perf_counter()
    gathered = await collector(question)
    trajectory = gathered.trajectory
    if trajectory.stop is Stop.FAILED:
        raise Unfinished(trajectory.error)
    return {
        "id": question.id,
        "seconds": round(time.perf_counter() - started, 4),
        "tokens": sum(len(segment.ids) for segment in trajectory.segments if segment.role is Role.POLICY),
        "response": gathered.response,
        "trajectory": trajectory_record(trajectory),
    }


def _context(record: Record) -> Context:
    trajectory, _ = trajectory_from_record(record["trajectory"])
    return Context(trajectory, record["response"], record["tokens"], record["seconds"])


@dataclass(frozen=True)
class SamplingConfig:
    """How the policy samples; greedy unless told otherwise."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = -1
    seed: int = 0

    def sampling(self) -> Sampling:
        """Return what the agent loop takes."""
        return Sampling(self.temperature, self.top_p, self.top_k, seed=self.seed)


@dataclass(frozen=True)
class CollectConfig:
    """What to collect.

    Attributes:
        questions: parquet of questions; a searcher's round-0 documents are its `initial_searched_results`.
        output: folder of the results.
        method: a key of `METHODS`.
        limit: take the first so many questions only.
        topk: documents of naive RAG and of the raw query; a searcher's top-k is its protocol's.
        corpus: corpus in which the oracle looks titles up.
        engine: the searcher's model and how it is run here.
        remote: the endpoint that serves the searcher, in place of `engine`.
        search: the searcher's protocol.
        initial_k: a searcher starts from so many documents found for the question itself; 0 takes the question's own.
        literature: the literature service that naive RAG and searchers search in place of the retriever.
        condenser: the model that condenses for Search-o1; the searcher's own if None.
        condenser_tokens: longest reply of the searcher's own model as the condenser.
    """

    questions: Path
    output: Path
    method: str = "naive_rag"
    limit: int | None = None
    topk: int = 3
    corpus: Path | None = None
    engine: EngineConfig | None = None
    remote: RemoteConfig | None = None
    search: SearchConfig = field(default_factory=S3Config)
    initial_k: int = 0
    condenser: GeneratorConfig | None = None
    condenser_tokens: int = 512
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    retriever: RetrieverClientConfig = field(default_factory=RetrieverClientConfig)
    literature: LiteratureConfig | None = None
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            near = nearest(self.method, list(METHODS))
            raise ValueError(f"method={self.method!r}; did you mean {near!r}? Methods: {', '.join(METHODS)}")
        if self.topk < 1:
            raise ValueError(f"topk={self.topk}; expected at least 1")
        if self.initial_k < 0 or self.condenser_tokens < 1:
            raise ValueError(
                f"initial_k={self.initial_k}, condenser_tokens={self.condenser_tokens}; expected at least 0 and 1"
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}; expected at least 1, or null for all questions")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A collector that is ready, and what its results depend on."""

    collector: Collector
    parameters: Mapping[str, Any]


async def _search(config: CollectConfig, stack: AsyncExitStack) -> tuple[RetrieverClient | LiteratureSearch, str]:
    """Open what is searched, and say what it is."""
    search = await stack.enter_async_context(open_search(config.retriever, config.literature))
    if config.method == "searcher" and isinstance(config.search, DeepRetrievalConfig) and config.search.task == "sql":
        return search, "none"  # a statement is the answer itself
    known = config.literature
    return search, known.engine if known else await retriever_identity(config.retriever.url)


async def _naive_rag(config: CollectConfig, questions: Sequence[Question], stack: AsyncExitStack) -> Prepared:
    search, identity = await _search(config, stack)
    return Prepared(NaiveRag(search, config.topk), {"retriever": identity, "topk": config.topk})


async def _raw_query(config: CollectConfig, questions: Sequence[Question], stack: AsyncExitStack) -> Prepared:
    search, identity = await _search(config, stack)
    return Prepared(NaiveRag(search, config.topk, raw_query), {"retriever": identity, "topk": config.topk})


async def _direct(config: CollectConfig, questions: Sequence[Question], stack: AsyncExitStack) -> Prepared:
    return Prepared(Direct(), {})


async def _oracle(config: CollectConfig, questions: Sequence[Question], stack: AsyncExitStack) -> Prepared:
    if config.corpus is None:
        raise ConfigError("method=oracle needs the corpus in which titles are looked up; set corpus=PATH")
    if not any(question.gold_titles for question in questions):
        raise DataError(f"{config.questions}: no question names its gold passages; the oracle needs gt_docs")
    corpus = Corpus.open(config.corpus)
    return Prepared(Oracle(passages_of(questions, corpus.documents())), {"corpus": corpus.fingerprint})


async def _searcher(config: CollectConfig, questions: Sequence[Question], stack: AsyncExitStack) -> Prepared:
    _check_policy(config)  # before anything is started
    search, identity = await _search(config, stack)
    policy, tokenizer, engine = _policy(config)
    stack.push_async_callback(engine.close)
    sampling = config.sampling.sampling()
    own = EngineChat(engine, tokenizer, replace(sampling, max_tokens=config.condenser_tokens))
    complete = await stack.enter_async_context(Condenser(config.condenser)) if config.condenser else own
    grammar = build_grammar(config.search, complete)
    collector = Searcher(grammar, engine, search, tokenizer, sampling, config.initial_k)
    parameters = {
        "retriever": identity,
        **policy,
        "search": config.search,
        "initial_k": config.initial_k,
        "condenser": config.condenser and config.condenser.model,
        "sampling": config.sampling,
    }
    return Prepared(collector, parameters)


async def _scripted(config: CollectConfig, questions: Sequence[Question], stack: AsyncExitStack) -> Prepared:
    """The s3 protocol played by a policy that knows the gold titles."""
    if not isinstance(config.search, S3Config):
        raise ConfigError(f"method=scripted plays search.protocol=s3, not {config.search.protocol}")
    search, identity = await _search(config, stack)
    tokenizer = Transcript()
    engine = TitleOracle(questions, tokenizer)
    collector = Searcher(build_grammar(config.search), engine, search, tokenizer, Sampling(0.0), config.initial_k)
    return Prepared(collector, {"retriever": identity, "search": config.search, "initial_k": config.initial_k})


class Condenser(GeneratorClient):
    """A generator service as the model that condenses."""

    async def __call__(self, messages: Sequence[Message]) -> str:
        """Return the reply; raises as `complete`."""
        return (await self.complete(messages)).text


def _check_policy(config: CollectConfig) -> None:
    if config.remote is not None and config.engine is not None:
        raise ConfigError("both engine and remote are set; set engine for a model here, or remote for an endpoint")
    if config.remote is None and config.engine is None:
        raise ConfigError(
            "method=searcher needs a model; set engine.model=PATH (and engine.kind=hf without vLLM), or "
            "remote.base_url and remote.model for an endpoint"
        )


def _policy(config: CollectConfig) -> tuple[Mapping[str, Any], Any, RolloutEngine | RemoteEngine]:
    """Return what identifies the searcher's model, its tokenizer and its engine."""
    if config.remote is not None:
        remote = config.remote
        tokenizer = Transcript() if remote.mode == "chat" else _tokenizer(str(remote.tokenizer), "remote.tokenizer")
        return {"model": remote.model, "mode": remote.mode}, tokenizer, RemoteEngine(remote, tokenizer)
    assert config.engine is not None  # checked before
    tokenizer = _tokenizer(config.engine.model, "engine.model")
    check_tokenizer(config.engine.model, tokenizer.vocab_size)
    identity = {"model": model_identity(config.engine.model), "dtype": config.engine.dtype}
    return identity, tokenizer, create_engine(config.engine)


def _tokenizer(name: str, key: str) -> Any:
    from transformers import AutoTokenizer  # takes seconds, and the other methods do without

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as cause:
        raise ConfigError(
            f"{key}={name}: its tokenizer does not load ({cause}); give the folder of a complete model, for example a "
            "checkpoint's hf/, or a hub name"
        ) from cause


METHODS: dict[str, Callable[[CollectConfig, Sequence[Question], AsyncExitStack], Awaitable[Prepared]]] = {
    "naive_rag": _naive_rag,
    "raw_query": _raw_query,
    "searcher": _searcher,
    "direct": _direct,
    "oracle": _oracle,
    "scripted": _scripted,
}


async def run(config: CollectConfig) -> list[Context]:
    """Collect as configured; raises what `collect` raises, and DataError when there are no questions."""
    questions = read_questions(config.questions, config.limit)
    if not questions:
        raise DataError(f"{config.questions} holds no question; expected at least one row")
    async with AsyncExitStack() as stack:
        prepared = await METHODS[config.method](config, questions, stack)
        parameters = {"method": config.method, **prepared.parameters}
        title = config.search.protocol if config.method == "searcher" else config.method
        contexts = await collect(questions, prepared.collector, config.output, parameters, title, config.run)
    logger.info("%d contexts in %s", len(contexts), config.output)
    return contexts


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return run_entry("collect", CollectConfig, sys.argv[1:] if arguments is None else arguments, _main)


def _main(config: CollectConfig) -> None:
    asyncio.run(run(config))


if __name__ == "__main__":
    sys.exit(main())
