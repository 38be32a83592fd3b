"""Measure what the retriever service costs over its engine, as ratios within one run on a synthetic corpus.

    python scripts/bench/retriever.py --documents 5000 --queries 256

Every row asks the same queries. `raw, one by one` and `raw, full batches` call the engine in this process; the other
rows go through a server process and HTTP: one client that waits for each answer, many clients of one query each, and
as many callers that share one `RetrieverClient`, which is how a rollout worker uses it. Engine and service share the
CPUs that the process may use, so pin it (`taskset`) for figures that compare.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from verl.retrieval.build import build_index
from verl.retrieval.client import RetrieverClient, RetrieverClientConfig
from verl.retrieval.corpus import Corpus
from verl.retrieval.engine import Engine, open_index
from verl.retrieval.server import bind
from verl.types import SearchResult

_SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of every engine."""

    queries: tuple[str, ...]
    topk: int
    clients: int
    batch: int


@dataclass(frozen=True, slots=True)
class Row:
    """One way to ask, and how fast it was."""

    name: str
    queries_per_s: float


def write_world(path: Path, documents: int, queries: int, rng: random.Random) -> tuple[str, ...]:
    """Write passages of 40 to 100 words with Zipf-like frequencies; return queries of 6 words taken from them."""
    words = ["".join(rng.choices(_SYLLABLES, k=rng.randint(2, 4))) for _ in range(20_000)]
    weights = [1 / (rank + 10) for rank in range(len(words))]
    asked: list[str] = []
    with path.open("w", encoding="utf-8") as file:
        for number in range(documents):
            passage = rng.choices(words, weights, k=rng.randint(40, 100))
            contents = f'"{" ".join(passage[:2])}"\n{" ".join(passage[2:])}'
            file.write(json.dumps({"id": str(number), "contents": contents}) + "\n")
            if len(asked) < queries:
                asked.append(" ".join(rng.sample(passage, 6)))
    while len(asked) < queries:
        asked.append(" ".join(rng.choices(words, weights, k=6)))
    return tuple(asked)


def measure_raw(engine: Engine, work: Workload) -> tuple[list[Row], list[SearchResult]]:
    """Call the engine in this process; also returns its results, which the service's must equal."""
    results: list[SearchResult] = []

    def one_by_one() -> None:
        results.extend(engine.search([query], work.topk)[0] for query in work.queries)

    def full_batches() -> None:
        for start in range(0, len(work.queries), work.batch):
            engine.search(work.queries[start : start + work.batch], work.topk)

    engine.search(work.queries[:1], work.topk)
    rows = [
        Row("raw, one by one", _rate(one_by_one, work)),
        Row(f"raw, full batches of {work.batch}", _rate(full_batches, work)),
    ]
    return rows, results


async def measure_service(url: str, work: Workload, expected: Sequence[SearchResult]) -> list[Row]:
    """Ask through HTTP, and check that the documents are the engine's."""
    config = RetrieverClientConfig(url=url, max_requests=work.clients)
    async with AsyncExitStack() as stack:
        own = [await stack.enter_async_context(RetrieverClient(config)) for _ in range(work.clients)]
        shared = await stack.enter_async_context(RetrieverClient(config))
        await asyncio.gather(*(client(work.queries[:1], work.topk) for client in (*own, shared)))
        ways = {
            "service, 1 client": own[:1],
            f"service, {work.clients} clients": own,
            f"service, {work.clients} callers of one client": [shared] * work.clients,
        }
        rows: list[Row] = []
        for name, clients in ways.items():
            start = time.perf_counter()
            results = await _ask(clients, work)
            rows.append(Row(name, len(work.queries) / (time.perf_counter() - start)))
            differing = sum(a.documents != b.documents for a, b in zip(results, expected, strict=True))
            if differing:
                raise SystemExit(f"{name}: {differing} of {len(expected)} results differ from the engine's")
    return rows


async def _ask(clients: Sequence[RetrieverClient], work: Workload) -> list[SearchResult]:
    """Share the queries out over the clients; each waits for an answer before it asks again."""
    results: dict[int, SearchResult] = {}
    waiting = iter(enumerate(work.queries))

    async def ask(client: RetrieverClient) -> None:
        for number, query in waiting:
            results[number] = (await client([query], work.topk))[0]

    await asyncio.gather(*(ask(client) for client in clients))
    return [results[number] for number in range(len(work.queries))]


def _rate(run: Callable[[], None], work: Workload) -> float:
    start = time.perf_counter()
    run()
    return len(work.queries) / (time.perf_counter() - start)


def measure(retriever: str, corpus: Corpus, folder: Path, work: Workload) -> list[Row]:
    """Build the index, measure the engine, then measure a server process over the same index."""
    build_index(corpus, retriever, folder)
    rows, expected = measure_raw(open_index(folder, corpus, retriever), work)
    with bind("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "verl.retrieval.server", "--index_path", str(folder), "--corpus_path"]
    command += [str(corpus.path), "--retriever_name", retriever, "--topk", str(work.topk), "--port", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        return rows + asyncio.run(measure_service(f"http://127.0.0.1:{port}/retrieve", work, expected))
    finally:
        server.terminate()
        server.wait()


def report(retriever: str, rows: Sequence[Row]) -> str:
    """Lay out the rates and their ratios to the two raw rows."""
    single, batched = rows[0].queries_per_s, rows[1].queries_per_s
    lines = [f"\n{retriever:<36}{'queries/s':>10}{'x one by one':>14}{'x batches':>11}"]
    for row in rows:
        rate = row.queries_per_s
        lines.append(f"  {row.name:<34}{rate:>10.1f}{rate / single:>14.2f}{rate / batched:>11.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark the retriever service against its engine.")
    parser.add_argument("--retrievers", nargs="+", default=["bm25", "minilm"])
    parser.add_argument("--documents", type=int, default=3000)
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.getLogger("verl").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.jsonl"
        queries = write_world(path, args.documents, args.queries, random.Random(args.seed))
        corpus = Corpus.open(path)
        work = Workload(queries, args.topk, args.clients, args.batch)
        for retriever in args.retrievers:
            rows = measure(retriever, corpus, Path(folder) / retriever, work)
            sys.stdout.write(report(retriever, rows) + "\n")


if __name__ == "__main__":
    main()
