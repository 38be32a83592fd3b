"""Measure a retriever on a test collection, with trec_eval's measures.

    python -m verl.retrieval.evaluate --collection scifact --index_path indexes/bm25 --retriever_name bm25 \\
        --output outputs/scifact-bm25
    python -m verl.retrieval.evaluate --collection scifact --retriever_name hybrid --index_path indexes/bm25 \\
        indexes/minilm --rerank_model cross-encoder/ms-marco-MiniLM-L-6-v2 --output outputs/scifact-rerank
    python -m verl.retrieval.evaluate --collection scifact --url http://127.0.0.1:4000/retrieve --output outputs/remote
    python -m verl.retrieval.evaluate --qrels qrels.txt --run other.trec --output outputs/other

An index is opened by the flags of the service (`verl.retrieval.server`), so what is measured is what would be served.
The output folder receives the run (`run.trec`) and `metrics.json` with means, intervals and the values per query. A run
holds the order in which the documents were returned: where scores are equal, they are lowered by the least there is.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from verl.errors import ConfigError, DataError, RetrieverError, SearchAgentError
from verl.retrieval.collection import Collection, open_beir, open_files
from verl.retrieval.measures import MEASURES, Bootstrap, Scores, score_run
from verl.retrieval.opening import REMOTE, open_engine
from verl.retrieval.server_flags import add_engine_flags, engine_options
from verl.retrieval.trec import Run, ranking, read_run, write_run
from verl.types import SearchResult

logger = logging.getLogger(__name__)

Search = Callable[[Sequence[str], int], Sequence[SearchResult | RetrieverError]]

RUN_NAME = "run.trec"
METRICS_NAME = "metrics.json"


@dataclass(frozen=True, slots=True)
class EvaluationConfig:
    """How a collection is searched.

    Attributes:
        topk: documents per query; measures that look deeper are left out.
        drop_self: leave out a document with the query's own id, as BEIR does; one more is asked for.
        batch_queries: queries of one call.
    """

    topk: int = 100
    drop_self: bool = False
    batch_queries: int = 256

    def __post_init__(self) -> None:
        for name in ("topk", "batch_queries"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; expected at least 1")


@dataclass(frozen=True, slots=True)
class System:
    """What is measured.

    Attributes:
        name: tag of the run.
        search: called with queries and `topk`; its results are best first.
        max_topk: the most that can be asked for, None where that is unknown.
        details: for the report.
        whole: whether `max_topk` documents are all there are; a fused or reranked list is cut before.
    """

    name: str
    search: Search
    max_topk: int | None
    details: Mapping[str, object]
    whole: bool = True


def search_collection(system: System, collection: Collection, config: EvaluationConfig) -> dict[str, dict[str, float]]:
    """Search for every query of a collection.

    Returns:
        the run; a query without a hit has an empty mapping.

    Raises:
        RetrieverError: a query could not be answered.
    """
    ids = list(collection.queries)
    topk = _depth(system, config) + config.drop_self
    topk = min(topk, system.max_topk) if system.max_topk is not None else topk
    run: dict[str, dict[str, float]] = {}
    with tqdm(total=len(ids), desc=f"searching {collection.name}", unit="query", delay=2, mininterval=1) as progress:
        for start in range(0, len(ids), config.batch_queries):
            batch = ids[start : start + config.batch_queries]
            results = system.search([collection.queries[id] for id in batch], topk)
            for id, result in zip(batch, results, strict=True):
                if isinstance(result, RetrieverError):
                    raise RetrieverError(f"query {id!r}: {result}") from result
                run[id] = _kept(id, result, config)
            progress.update(len(batch))
    return run


def measures_of(system: System, config: EvaluationConfig) -> tuple[str, ...]:
    """Name the measures that the searched depth allows: recall@100 of 20 documents would be another measure."""
    depth = _depth(system, config)
    whole = system.whole and system.max_topk is not None and depth >= system.max_topk
    return tuple(name for name, measure in MEASURES.items() if whole or (measure.cutoff or 0) <= depth)


def write_report(folder: Path, run: Run, scores: Scores, facts: Mapping[str, object], tag: str) -> None:
    """Write the run and its metrics into `folder`, each under its final name only when complete.

    Raises:
        DataError: an id that a TREC run cannot hold, or the folder cannot be written.
    """
    report = {
        **facts,
        "queries": len(scores.per_query),
        "without_hits": scores.without_hits,
        "without_relevant": scores.without_relevant,
        "metrics": {name: asdict(estimate) for name, estimate in scores.estimates.items()},
        "per_query": scores.per_query,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as workplace:
            write_run(Path(workplace) / RUN_NAME, run, tag)
            (Path(workplace) / METRICS_NAME).write_text(json.dumps(report, indent=1) + "\n", "utf-8")
            for name in (RUN_NAME, METRICS_NAME):
                os.replace(Path(workplace) / name, folder / name)
    except OSError as error:
        raise DataError(f"cannot write {folder} ({error}); free some space or pass another --output") from error


def table(scores: Scores) -> str:
    """Lay out the means and intervals as text."""
    lines = [f"{'measure':<12}{'mean':>8}{'95 % interval':>20}"]
    for name, estimate in scores.estimates.items():
        interval = f"{estimate.low:.4f} to {estimate.high:.4f}"
        lines.append(f"{name:<12}{estimate.mean:>8.4f}{interval:>20}")
    lines.append(f"{len(scores.per_query)} queries, {scores.without_hits} of them without a hit")
    if scores.without_relevant:
        lines.append(f"{scores.without_relevant} judged queries have no relevant document and are left out")
    return "\n".join(lines)


def _depth(system: System, config: EvaluationConfig) -> int:
    return config.topk if system.max_topk is None else min(config.topk, system.max_topk)


def _kept(query: str, result: SearchResult, config: EvaluationConfig) -> dict[str, float]:
    """Return the scores of the documents that count, at most `topk`."""
    scores = ranking([document.id for document in result.documents], result.scores)
    if config.drop_self:
        scores.pop(query, None)
    return dict(list(scores.items())[: config.topk])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure from the command line."""
    parser = _parser()
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("faiss").setLevel(logging.WARNING)  # it reports every instruction set it does not find
    try:
        sys.stdout.write(_evaluate(args) + "\n")
    except SearchAgentError as error:
        parser.exit(1, f"error: {error}\n")


def _evaluate(args: argparse.Namespace) -> str:
    chosen = [flag for flag in ("index_path", "url", "run") if getattr(args, flag)]
    if len(chosen) != 1:
        given = ", ".join(f"--{flag}" for flag in chosen) or "none"
        raise ConfigError(f"{given} given; expected one of --index_path, --url and --run")
    if not args.index_path:
        _refuse_engine_flags(args)
    collection = _collection(args)
    bootstrap = Bootstrap(seed=args.seed)
    facts: dict[str, object] = {"collection": collection.name}
    if args.run:
        run: Run = read_run(Path(args.run))
        if args.drop_self:
            run = {query: {id: run[query][id] for id in run[query] if id != query} for query in run}
        scores = score_run(run, collection.qrels, bootstrap=bootstrap)
        facts |= {"run": args.run, "depth": max(map(len, run.values())), "drop_self": args.drop_self}
        tag = Path(args.run).stem.replace(" ", "_")
    else:
        config = EvaluationConfig(args.topk, args.drop_self)
        with _service(args.url) if args.url else _index(args) as system:
            start = time.perf_counter()
            run = search_collection(system, collection, config)
            seconds = time.perf_counter() - start
        scores = score_run(run, collection.qrels, measures_of(system, config), bootstrap)
        facts |= {
            "system": dict(system.details),
            "topk": config.topk,
            "drop_self": config.drop_self,
            "seconds": seconds,
        }
        tag = system.name
    if not any(any(values.values()) for values in scores.per_query.values()):
        logger.warning("no query found a relevant document: do the qrels and the corpus have the same document ids?")
    write_report(Path(args.output), run, scores, facts, tag)
    return table(scores)


def _refuse_engine_flags(args: argparse.Namespace) -> None:
    """Refuse flags that would have no effect: only what is opened here is searched as they say."""
    flags = argparse.ArgumentParser()
    add_engine_flags(flags, name_required=False)
    for name, usual in vars(flags.parse_args([])).items():
        if getattr(args, name) != usual:
            raise ConfigError(f"--{name} concerns an index that is opened here; pass --index_path, or leave it out")


def _collection(args: argparse.Namespace) -> Collection:
    if bool(args.collection) == bool(args.qrels):
        raise ConfigError("pass either --collection, or --qrels (with --queries, unless a --run is scored)")
    if args.collection:
        return open_beir(Path(args.collection), args.split)
    if not args.queries and not args.run:
        raise ConfigError("--qrels without --queries: there is nothing to search for; pass --queries")
    return open_files(Path(args.queries) if args.queries else None, Path(args.qrels))


@contextmanager
def _index(args: argparse.Namespace) -> Iterator[System]:
    if args.retriever_name in REMOTE:
        raise ConfigError(f"retriever_name={args.retriever_name} has no --index_path; serve it, and pass --url")
    corpus_path = args.corpus_path or (Path(args.collection) if args.collection else None)
    if not args.retriever_name or (corpus_path is None and args.retriever_name != "lucene"):
        raise ConfigError("--index_path needs --retriever_name, and --corpus_path unless --collection holds the corpus")
    options = engine_options(argparse.Namespace(**{**vars(args), "corpus_path": corpus_path}))
    engine = open_engine(options).engine
    try:
        info = engine.info
        yield System(info.name, engine.search, info.max_topk, asdict(info), info.max_topk == info.documents)
    finally:
        engine.close()


@contextmanager
def _service(url: str) -> Iterator[System]:
    # Imported here: nothing else needs an HTTP client.
    from verl.retrieval.client import RetrieverClientConfig, search_sync

    config = RetrieverClientConfig(url=url)
    yield System("service", lambda queries, topk: search_sync(config, queries, topk), None, {"url": url})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m verl.retrieval.evaluate", description="Measure a retriever.")
    config = EvaluationConfig()
    what = parser.add_argument_group("test collection")
    what.add_argument("--collection", help="BEIR folder: queries.jsonl, qrels/*.tsv and usually corpus.jsonl")
    what.add_argument("--split", help="file in the folder's qrels (default: test, or the only one)")
    what.add_argument("--qrels", help="judgements in TREC's or BEIR's format, in place of --collection")
    what.add_argument("--queries", help="jsonl (_id, text) or tsv (id, text), with --qrels")
    how = parser.add_argument_group("what to measure: --index_path (below), or one of")
    how.add_argument("--url", help="a running service, for example http://127.0.0.1:3000/retrieve")
    how.add_argument("--run", help="a finished run in TREC's format")
    add_engine_flags(parser, name_required=False)
    parser.add_argument("--output", required=True, help=f"folder for {RUN_NAME} and {METRICS_NAME}")
    parser.add_argument(
        "--topk", type=int, default=config.topk, help=f"documents searched per query (default: {config.topk})"
    )
    parser.add_argument("--drop_self", action="store_true", help="leave out a document with the query's own id")
    parser.add_argument("--seed", type=int, default=Bootstrap().seed, help="of the bootstrap interval")
    return parser


if __name__ == "__main__":
    main()
