"""Score queries and SQL statements by what they find, several methods in one report.

    python -m verl.evaluation.deepretrieval metric=recall output=outputs/pubmed contexts.deepretrieval=FOLDER \\
        contexts.raw_query=FOLDER against=raw_query setting=pubmed

A folder is what `s3 collect` wrote: of a policy or any model (`method=searcher search.protocol=deepretrieval`), or of
the raw question (`method=raw_query`). Written are `report.json` and `report.md`, one jsonl of scored questions a method
(`scores/`), and `results/eval_results_NAME.json`. `verl.evaluation.query_scores` says what is measured, over whom;
`filter` scores the queries once more without the answers that they give away (`verl.evaluation.injection`).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from generator_llms.client import GeneratorClient
from generator_llms.config import GeneratorConfig
from verl.agent.grammar.base import Message
from verl.agent.protocols import Search, bound_to
from verl.config import run_entry
from verl.errors import DataError, GeneratorError, RetrieverError
from verl.evaluation.collect import Context, collect_seconds, iter_contexts
from verl.evaluation.injection import ModelFilter, Stripped, strip_answers
from verl.evaluation.journal import write_whole
from verl.evaluation.paper_numbers import PAPER
from verl.evaluation.query_scores import (
    DEPTH,
    HEADLINE,
    Metric,
    QueryRow,
    check_failures,
    compare_rows,
    document_scores,
    method_figures,
    nothing,
    score_trajectory,
)
from verl.evaluation.report import markdown, plain, table, write_report
from verl.records import read_questions
from verl.retrieval.client_config import RetrieverClientConfig
from verl.retrieval.engines.choice import open_search
from verl.retrieval.engines.literature import LiteratureConfig
from verl.retrieval.engines.sql import SqlEngine
from verl.retrieval.measures import Bootstrap
from verl.rewards.evidence import Tools
from verl.rewards.registry import RewardConfig, Scorer
from verl.rewards.sql_config import SqlConfig
from verl.typed import nearest
from verl.types import Question

Filter = Literal["none", "tokens", "model"]
Strip = Callable[[Question, str], Awaitable[Stripped]]


@dataclass(frozen=True)
class QueriesConfig:
    """What to score.

    Attributes:
        output: folder of the report, the scored questions and the published results.
        metric: see `verl.evaluation.query_scores`.
        contexts: folders that `s3 collect` wrote, by the method's name in the report.
        questions: what was to be asked, so that what is in no folder counts as failed; else the folders say it.
        limit: take the first so many of `questions` only.
        against: the method that every other one is compared with.
        filter: score the queries without the answers in them too: found by tokens, or by a model.
        filter_generator: that model.
        retriever, literature: what the filtered queries are searched with; as for `s3 collect`.
        sql: databases and limits, for the metric `execution`.
        execution: parameters of the reward `execution_accuracy`: dataset, variant, comparison.
        setting: put the paper's figures beside ours; only where questions and engine are the paper's.
        max_failed_fraction: a larger share of failed questions is an error, because the figures would mean little.
        concurrency: questions that are worked on at once.
        seed: written to the report; of the run that is evaluated.
    """

    output: Path
    metric: Metric
    contexts: Mapping[str, Path] = field(default_factory=dict)
    questions: Path | None = None
    limit: int | None = None
    against: str | None = None
    filter: Filter = "none"
    filter_generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    retriever: RetrieverClientConfig = field(default_factory=RetrieverClientConfig)
    literature: LiteratureConfig | None = None
    sql: SqlConfig | None = None
    execution: Mapping[str, Any] = field(default_factory=dict)
    setting: Literal["pubmed", "ctgov"] | None = None
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    max_failed_fraction: float = 0.05
    concurrency: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.contexts:
            raise ValueError("contexts is empty; name a folder for each method, contexts.deepretrieval=PATH")
        if self.against is not None and self.against not in self.contexts:
            near = nearest(self.against, list(self.contexts))
            raise ValueError(f"against={self.against!r} is no method of contexts; did you mean {near!r}?")
        if self.metric == "execution" and self.sql is None:
            raise ValueError("metric=execution needs the databases; set sql.databases=FOLDER")
        if self.metric == "execution" and self.filter != "none":
            raise ValueError(f"filter={self.filter} is for queries; statements give no answer away, leave it out")
        if not 0 <= self.max_failed_fraction <= 1:
            raise ValueError(f"max_failed_fraction={self.max_failed_fraction}; expected a number from 0 to 1")
        if self.concurrency < 1 or (self.limit is not None and self.limit < 1):
            raise ValueError(f"concurrency={self.concurrency}, limit={self.limit}; expected at least 1")


async def run(config: QueriesConfig) -> dict[str, Any]:
    """Score as configured, write the report and return it.

    Raises:
        DataError: a folder holds no contexts, or those of other questions, or of too few documents.
        RetrieverError: more questions failed than `max_failed_fraction` allows.
    """
    asked = {q.id: q for q in read_questions(config.questions, config.limit)} if config.questions else None
    methods: dict[str, dict[str, Any]] = {}
    rows: dict[str, list[QueryRow]] = {}
    async with AsyncExitStack() as stack:
        scoring = await _Scoring.open(config, stack)
        for name, folder in config.contexts.items():
            started = time.perf_counter()
            rows[name] = await scoring.score(name, folder, asked)
            check_failures(name, rows[name], config.max_failed_fraction)
            methods[name] = method_figures(rows[name], config.metric, config.bootstrap)
            methods[name]["seconds"] = round(collect_seconds(folder) + time.perf_counter() - started, 2)
            _write_rows(config.output, name, rows[name])
    for name in methods.keys() - {config.against} if config.against else ():
        compared = compare_rows(rows[name], rows[config.against or ""], config.metric, config.bootstrap)
        methods[name]["against_baseline"] = asdict(compared)
    return _report(config, methods)


def failures(folder: Path) -> dict[str, str]:
    """Return the cause of each question that `s3 collect` could not finish, by its id."""
    path = folder / "errors.jsonl"
    if not path.is_file():
        return {}
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {record["id"]: record["cause"] for record in records}


def collected_topk(folder: Path) -> int | None:
    """Return how many documents of each query were asked for; None where the folder does not say."""
    path = folder / "contexts.jsonl"
    if not path.is_file():
        return None
    with path.open(encoding="utf-8") as file:
        parameters = json.loads(file.readline()).get("parameters", {})
    return parameters.get("topk") or (parameters.get("search") or {}).get("topk")


@dataclass(frozen=True)
class _Scoring:
    """What scoring needs besides the contexts."""

    config: QueriesConfig
    strip: Strip | None = None
    search: Search | None = None
    scorer: Scorer | None = None

    @classmethod
    async def open(cls, config: QueriesConfig, stack: AsyncExitStack) -> _Scoring:
        """Open what the configuration asks for, until the stack closes."""
        if config.metric == "execution":
            assert config.sql is not None  # checked by the configuration
            engine = SqlEngine(config.sql)
            stack.push_async_callback(engine.aclose)
            term = "execution_accuracy"
            reward = RewardConfig(terms={term: 1.0}, params={term: config.execution}, sql=config.sql)
            return cls(config, scorer=Scorer(reward, _never, tools=Tools(sql=engine)))
        if config.filter == "none":
            return cls(config)
        search = await stack.enter_async_context(open_search(config.retriever, config.literature))
        if config.filter == "tokens":
            return cls(config, _by_tokens, search)
        client = await stack.enter_async_context(GeneratorClient(config.filter_generator))

        async def complete(messages: Sequence[Message]) -> str:
            return (await client.complete(messages)).text

        return cls(config, ModelFilter(complete), search)

    async def score(self, name: str, folder: Path, asked: Mapping[str, Question] | None) -> list[QueryRow]:
        """Return a row for every question that was to be asked, in order."""
        topk, depth = collected_topk(folder), DEPTH[self.config.metric]
        if topk is not None and topk < depth:
            raise DataError(
                f"{name}: {folder} holds the first {topk} documents of each query, but {HEADLINE[self.config.metric]} "
                f"and its like look at {depth}; collect again with search.topk={depth} (topk={depth} for raw_query)"
            )
        rows: dict[str, QueryRow] = {}
        with tqdm(desc=f"scoring {name}", unit="q") as bar:
            for part in _parts(self._asked_of(name, folder, asked), self.config.concurrency):
                for row in await asyncio.gather(*map(self._row, part)):
                    rows[row.id] = row
                bar.update(len(part))
        return self._with_failures(rows, failures(folder), asked)

    def _asked_of(self, name: str, folder: Path, asked: Mapping[str, Question] | None) -> Iterator[Context]:
        """Yield the contexts, checking that they are of the questions that were to be asked."""
        for context in iter_contexts(folder):
            id = context.trajectory.question.id
            if asked is None or id in asked:
                yield context
            elif self.config.limit is None:
                raise DataError(
                    f"{name}: {folder} holds {id!r}, which is not in {self.config.questions}; give its file"
                )

    def _with_failures(
        self, rows: Mapping[str, QueryRow], causes: Mapping[str, str], asked: Mapping[str, Question] | None
    ) -> list[QueryRow]:
        ids = list(asked) if asked is not None else [*rows, *(id for id in causes if id not in rows)]
        if not ids:
            raise DataError("no question was asked; expected the folder of `s3 collect` with at least one")
        lost = nothing(self.config.metric)
        return [
            rows.get(id) or QueryRow(id, _source(id, asked), None, lost, failed=causes.get(id, "was not collected"))
            for id in ids
        ]

    async def _row(self, context: Context) -> QueryRow:
        row = await score_trajectory(self.config.metric, context.trajectory, self.scorer)
        row = replace(row, tokens=context.tokens, seconds=context.seconds)
        if self.strip is None or row.query is None or row.failed:
            return row if self.strip is None else replace(row, injected=())
        return await self._filtered(context.trajectory.question, row)

    async def _filtered(self, question: Question, row: QueryRow) -> QueryRow:
        """Take the answers out of the query and score what it finds then; a failure counts against it."""
        assert self.strip is not None and self.search is not None and row.query is not None
        metric = self.config.metric
        try:
            stripped = await self.strip(question, row.query)
            if not stripped.injected:
                return replace(row, injected=())
            row = replace(row, injected=stripped.injected, filtered=stripped.query, filtered_scores=nothing(metric))
            if not stripped.query:
                return row
            (result,) = await bound_to(self.search, question)([stripped.query], DEPTH[metric])
        except (GeneratorError, RetrieverError) as error:
            row = row if row.filtered is not None else replace(row, injected=(), filtered="")
            return replace(row, filter_failed=str(error), filtered_scores=nothing(metric))
        return replace(row, filtered_scores=document_scores(metric, question, result.documents))


async def _by_tokens(question: Question, query: str) -> Stripped:
    return strip_answers(question, query)


async def _never(*_: object) -> Any:
    raise AssertionError("execution accuracy asks no generator")


def _source(id: str, asked: Mapping[str, Question] | None) -> str:
    return asked[id].source if asked is not None else id.partition("/")[0]


def _parts(items: Iterator[Context], size: int) -> Iterator[list[Context]]:
    while part := list(itertools.islice(items, size)):
        yield part


def _write_rows(output: Path, name: str, rows: Sequence[QueryRow]) -> None:
    """Write the scored questions, and the published name's file with one entry a question."""
    write_whole(output / "scores" / f"{name}.jsonl", "".join(json.dumps(asdict(row)) + "\n" for row in rows))
    results = {row.id: {"query": row.query, "documents": row.documents, **row.scores} for row in rows}
    means = {key: sum(row.scores[key] for row in rows) / len(rows) for key in rows[0].scores}
    failed = sum(bool(row.failed) for row in rows)
    published = {"average": means, "total": len(rows), "failed": failed, "results": results}
    write_whole(output / "results" / f"eval_results_{name}.json", json.dumps(published, indent=1))


def _report(config: QueriesConfig, methods: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Write the report, with the paper's figures and the filter's where there are any."""
    paper = PAPER[config.setting] if config.setting else {}
    for name, figures in methods.items():
        if name in paper:
            figures["paper"] = paper[name] / 100
    extra: dict[str, Any] = {"metric": config.metric, "headline": HEADLINE[config.metric], "setting": config.setting}
    extra |= {"baseline": config.against} if config.against else {}
    report = write_report(config.output, methods, config.seed, extra)
    sections = [(config.output / "report.md").read_text(encoding="utf-8")]
    sections.append("Questions that failed, or whose answer could not be read, count as 0 in every value.\n")
    if paper:
        sections += ["## Published", markdown([["method", "paper"], *([n, f"{v:.2f}"] for n, v in paper.items())])]
    if config.filter != "none":
        sections += [f"## Without the answers in the queries ({config.filter})", markdown(injection_table(methods))]
    write_whole(config.output / "report.md", "\n".join(sections))
    return report


def injection_table(methods: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return, as rows of cells, how often queries give an answer away, and their scores with and without it."""
    found = {name: figures["injection"] for name, figures in methods.items() if "injection" in figures}
    names = list(dict.fromkeys(name for figures in found.values() for name in figures["scores"]))
    rows = [["method", "injected", *(heading for name in names for heading in (name, f"{name} without"))]]
    for method, figures in found.items():
        pairs = [(methods[method]["scores"][name], figures["scores"][name]) for name in names]
        rows.append([method, *(f"{100 * value:.1f}" for value in (figures["injected"], *itertools.chain(*pairs)))])
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return run_entry("evaluate_queries", QueriesConfig, sys.argv[1:] if arguments is None else arguments, _main)


def _main(config: QueriesConfig) -> None:
    report = asyncio.run(run(config))
    sys.stdout.write("\n" + plain(table(report["methods"])))
    if config.filter != "none":
        sys.stdout.write("\n" + plain(injection_table(report["methods"])))


if __name__ == "__main__":
    sys.exit(main())
