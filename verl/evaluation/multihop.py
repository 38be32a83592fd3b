"""Real multi-hop questions over the passages that their sets ship: what naive RAG finds by each retriever, and the
ceiling that a searcher could reach, in one command and without a generator.

    python -m verl.evaluation.multihop folder=../shared/data output=outputs/multihop

Questions and pooled corpus are built, every index is built and served, and through each service two methods collect:
naive RAG, and the s3 protocol played by a policy that knows the gold titles (`verl.evaluation.scripted`). The oracle,
which looks the titles up in the corpus, is the ceiling. Written is the report of `s3 evaluate answers=false`: recall
of the gold passages and answer in context, with intervals. Everything finished is kept and taken up by the next run.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from data_preprocess import qa
from data_preprocess.pooled_corpus import PoolConfig, pool_corpus
from data_preprocess.qa import QaConfig, SampleConfig
from data_preprocess.readers.source import SourceConfig
from verl.agent.grammar.s3 import S3Config
from verl.config import run_entry
from verl.evaluation import collect
from verl.evaluation.collect import CollectConfig, Context, collect_seconds, iter_contexts
from verl.evaluation.evaluate import figures, score_passages
from verl.evaluation.report import passage_table, plain, write_report
from verl.evaluation.summary import ScoringConfig
from verl.evaluation.variants import cut, with_documents
from verl.retrieval.build import build_index
from verl.retrieval.client import RetrieverClientConfig
from verl.retrieval.corpus import Corpus
from verl.rewards.recall import title_key
from verl.services import free_port, retriever_service, running

RetrieverName = Literal["bm25", "minilm", "hybrid"]
_FUSED: tuple[RetrieverName, ...] = ("bm25", "minilm")


@dataclass(frozen=True)
class MultihopConfig:
    """What is measured.

    Attributes:
        output: folder of everything that is built and of the report.
        folder: that of the published files; `configs/multihop.yaml` says which they are.
        questions: sources of the questions, as in `data_preprocess.qa`; their passages are pooled too.
        passages: further sources, pooled only.
        per_set: draw at most so many questions of each set; None takes all.
        retrievers: by which naive RAG and the scripted searcher search; hybrid fuses the other two.
        topk: naive RAG is scored at each of these numbers of documents.
        search: of the scripted searcher. Its room is wider than a model's, so that no shown document is cut off.
    """

    output: Path
    folder: Path
    questions: Mapping[str, SourceConfig] = field(default_factory=dict)
    passages: Mapping[str, SourceConfig] = field(default_factory=dict)
    per_set: int | None = None
    retrievers: tuple[RetrieverName, ...] = get_args(RetrieverName)
    topk: tuple[int, ...] = (3, 8)
    search: S3Config = field(
        default_factory=lambda: S3Config(max_observation_tokens=4000, max_prompt_tokens=8000, max_context_tokens=30_000)
    )
    scoring: ScoringConfig = field(default_factory=ScoringConfig)

    def __post_init__(self) -> None:
        if not self.questions:
            raise ValueError("questions is empty; name a source, for example questions.hotpotqa.path=FILE")
        if not self.retrievers or not self.topk or min(self.topk) < 1:
            raise ValueError(f"retrievers={self.retrievers}, topk={self.topk}; expected some, and topk of at least 1")


def measure(config: MultihopConfig) -> dict[str, Any]:
    """Build, serve, collect and score as configured; write the report and return it.

    Returns:
        The report; `ceiling` has, for every scripted searcher, how many questions it finds all for that the oracle
        finds, and of the others the ids.

    Raises:
        ConfigError, DataError: the data is not there or cannot be used.
        ServiceError: a retriever did not start.
    """
    build_data(config)
    corpus = _corpus(config)
    for name in _FUSED:
        if name in config.retrievers or "hybrid" in config.retrievers:
            build_index(corpus, name, _index(config, name))
    for name in config.retrievers:
        _collect_through(config, name)
    asyncio.run(
        collect.run(CollectConfig(_questions(config), _contexts(config, "oracle"), "oracle", corpus=corpus.path))
    )
    return _report(config)


def build_data(config: MultihopConfig) -> None:
    """Build questions and corpus, unless they are built; raises as `measure`."""
    qa.build(QaConfig(config.output / "questions", config.questions, sample=SampleConfig(test=config.per_set)))
    pool_corpus(PoolConfig(config.output / "pool" / "corpus.jsonl", {**config.questions, **config.passages}))


def _collect_through(config: MultihopConfig, name: RetrieverName) -> None:
    """Serve one index, and collect naive RAG and the scripted searcher through it."""
    indexes = _FUSED if name == "hybrid" else (name,)
    service = retriever_service(
        [_index(config, index) for index in indexes],
        config.output / "pool" / "corpus.jsonl",
        name,
        topk=max(*config.topk, config.search.topk),
        port=free_port(),
        log_path=config.output / "logs" / f"{name}.log",
    )
    with running(service):
        reached = RetrieverClientConfig(url=f"{service.url}/retrieve")
        asked = _questions(config)
        naive = CollectConfig(asked, _contexts(config, name), topk=max(config.topk), retriever=reached)
        scripted = CollectConfig(
            asked, _contexts(config, f"scripted_{name}"), "scripted", search=config.search, retriever=reached
        )
        for method in (naive, scripted):
            asyncio.run(collect.run(method))


def _report(config: MultihopConfig) -> dict[str, Any]:
    methods: dict[str, dict[str, Any]] = {}
    oracle = list(iter_contexts(_contexts(config, "oracle")))
    ceiling = {}
    for name in config.retrievers:
        found = list(iter_contexts(_contexts(config, name)))
        for topk in config.topk:
            methods[f"{name}_top{topk}"] = _figures(config, f"{name}_top{topk}", name, _cut(found, topk))
    for name in (f"scripted_{name}" for name in config.retrievers):
        found = list(iter_contexts(_contexts(config, name)))
        methods[name] = _figures(config, name, name, found)
        below = _below(found, oracle)
        ceiling[name] = {"reached": len(found) - len(below), "n": len(found), "below": below}
    methods["oracle"] = _figures(config, "oracle", "oracle", oracle)
    return write_report(config.output, methods, config.scoring.seed, {"ceiling": ceiling})


def _figures(config: MultihopConfig, name: str, folder: str, contexts: Sequence[Context]) -> dict[str, Any]:
    scored = score_passages(name, contexts, config.output, config.scoring)
    return figures(scored, contexts, collect_seconds(_contexts(config, folder)), answered=False)


def _cut(contexts: Sequence[Context], topk: int) -> list[Context]:
    return [
        Context(with_documents(found.trajectory, cut(found.trajectory.documents, topk)), *_costs(found))
        for found in contexts
    ]


def _costs(context: Context) -> tuple[str, int, float]:
    return context.response, context.tokens, context.seconds


def _below(found: Sequence[Context], oracle: Sequence[Context]) -> list[str]:
    """Return the questions of which a gold passage was not found that the oracle found."""
    known = {context.trajectory.question.id: _gold_found(context) for context in oracle}
    return [
        context.trajectory.question.id
        for context in found
        if known[context.trajectory.question.id] - _gold_found(context)
    ]


def _gold_found(context: Context) -> set[str]:
    gold = {title_key(title) for title in context.trajectory.question.gold_titles}
    return gold & {title_key(document.title) for document in context.trajectory.documents}


def _corpus(config: MultihopConfig) -> Corpus:
    return Corpus.open(config.output / "pool" / "corpus.jsonl")


def _questions(config: MultihopConfig) -> Path:
    return config.output / "questions" / "test.parquet"


def _index(config: MultihopConfig, name: str) -> Path:
    return config.output / "indexes" / name


def _contexts(config: MultihopConfig, name: str) -> Path:
    return config.output / "contexts" / name


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return run_entry("multihop", MultihopConfig, sys.argv[1:] if arguments is None else arguments, _main)


def _main(config: MultihopConfig) -> None:
    report = measure(config)
    sys.stdout.write("\n" + plain(passage_table(report["methods"])))
    for name, found in report["ceiling"].items():
        sys.stdout.write(f"{name}: {found['reached']} of {found['n']} questions at the oracle's ceiling\n")


if __name__ == "__main__":
    sys.exit(main())
