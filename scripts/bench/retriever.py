"""Measure what the retriever service costs over its engine, as ratios within one run on a synthetic corpus.

    python scripts/bench/retriever.py [--retrievers bm25 minilm] [--documents 100000] [--rounds 3]
    python scripts/bench/retriever.py --retrievers minilm --documents 500     # nearly all of a query is encoding

Every row asks the same queries, `--rounds` times in turn with the other rows, and shows the median. The first rows call
in one process: the bare library (encoder and FAISS, or bm25s; row numbers only), in full batches and in the largest
that 32 clients can make, and the engine (with documents), full batches and one by one. The next ask over HTTP: a naive
server that encodes and searches one request at a time, with sentence-transformers and FAISS or with bm25s as one writes
it first, and the same over our engine; and the service, without its cache of results, with 1, 32 and 1,000 clients of
one query each on raw keep-alive connections, and with 32 callers that share one `RetrieverClient`; then, with its
cache, 32 clients that ask every query five times, as the rollouts of one question do. The last ones load the service
with half of what it can do, and show latencies: of requests that come evenly, and at random (Poisson), where even an
ideal queue with one server has a p99 of 4.3 times the service time, if batches bring nothing. All that answers is bound
to one CPU, all that asks to another. `cpu` is the CPU time of a query on the answering side, which other work on the
machine disturbs less than the clock does. Every answer is compared with the engine's; the libraries' scores may differ
in their last digits, and documents of equal scores in their order.

Queries are really encoded; the vectors of a dense index are mostly random unit vectors instead of encoded passages,
which take an hour to encode and are searched in the same time. The defaults take about six minutes on two slow cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from retriever_parts import HERE, Bare, Process, ask, index_random, server, stop_in_order, write_world

from verl.retrieval.build import build_index
from verl.retrieval.client import RetrieverClient, RetrieverClientConfig
from verl.retrieval.corpus import Corpus
from verl.retrieval.server_config import ServerConfig
from verl.services import free_port

LIBRARY = "library, full batches"
LIBRARY_OF_CLIENTS = "library, batches of 32"
ENGINE = "engine, full batches"
SINGLE = "engine, one by one"
ALONE = "service, 1 client"
NAIVE = "naive server, 32 clients"
NAIVE_ENGINE = "naive server of our engine"
SERVICE = "service, 32 clients"
MANY = "service, 1000 clients"
GROUPS = "with cache, groups of 5"
EVEN = "service, half load, even"

_SERVER = ServerConfig()
_QUERIES = 512
_CLIENTS = 32
_MANY_CLIENTS = 1000
_GROUP = 5
_NEAR = 1e-5
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True, slots=True)
class Work:
    """What is asked of every row; each runs for about `seconds`."""

    queries: tuple[str, ...]
    topk: int
    seconds: float
    rounds: int
    cpus: tuple[int, int]


@dataclass(slots=True)
class Row:
    """One way to ask: queries a second and CPU milliseconds of a query, by round, and the latencies of all rounds."""

    name: str
    rates: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.rates)

    @property
    def cpu(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.cpu_ms)

    def quantile_ms(self, share: float) -> float:
        """Return the latency that this share of the requests does not exceed."""
        ordered = sorted(self.latencies_ms)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Bench:
    """One retriever: the processes that answer, what they should answer, and the rows so far."""

    def __init__(self, retriever: str, folder: Path, corpus: Path, work: Work, stack: ExitStack) -> None:
        self._work = work
        self._rows: dict[str, Row] = {}
        self._bare = Bare(retriever, folder, corpus, work.topk, work.cpus[0])
        stack.callback(self._bare.stop)
        naive = (HERE / "retriever_naive.py",)
        of = (retriever, folder, corpus)
        ours = ("-m", "verl.retrieval.server", "--index_path", folder, "--corpus_path", corpus, "--retriever_name")
        ours += (retriever, "--topk", work.topk, "--threads", 1)
        self._naive, self._naive_engine, self._service, self._cached = (
            stack.enter_context(server(arguments, free_port(), work.cpus[0]))
            for arguments in ((*naive, "library", *of), (*naive, "engine", *of), (*ours, "--cache_mb", 0), ours)
        )
        self._expected = self._answers_of(work.queries)
        for process in (self._naive, self._naive_engine, self._service, self._cached):
            self._warm_up(process)

    def run(self) -> list[Row]:
        """Measure all rows, round by round."""
        for number in range(self._work.rounds):
            self._in_process(LIBRARY, "library", _SERVER.batch_queries)
            self._in_process(LIBRARY_OF_CLIENTS, "library", _CLIENTS)
            self._in_process(ENGINE, "engine", _SERVER.batch_queries)
            self._in_process(SINGLE, "engine", 1)
            self._over_http(NAIVE, self._naive, clients=_CLIENTS)
            self._over_http(NAIVE_ENGINE, self._naive_engine, clients=_CLIENTS)
            self._over_http(ALONE, self._service, clients=1)
            self._over_http(SERVICE, self._service, clients=_CLIENTS)
            self._over_http(MANY, self._service, clients=_MANY_CLIENTS)
            self._by_client("service, 32 callers of one client")
            self._in_groups(GROUPS, number)
            half = self._rows[SERVICE].rate / 2
            self._over_http(EVEN, self._service, rate=half)
            self._over_http("service, half load, Poisson", self._service, rate=half, poisson=True)
        return list(self._rows.values())

    def _warm_up(self, process: Process) -> None:
        """Ask what is not measured: the first batches of an encoder take a third longer."""
        queries = [f"{text} zero" for text in self._work.queries]
        ask({"port": process.port, "bodies": self._bodies(queries), "requests": len(queries), "clients": _CLIENTS})

    def _count(self, name: str, floor: int) -> int:
        """Return how many queries take about the time that a row should take, by what is known of its rate."""
        known = self._rows.get(name) or self._rows.get(SINGLE) or self._rows.get(ENGINE)
        rate = known.rate if known else floor / self._work.seconds
        return max(floor, int(rate * self._work.seconds))

    def _note(self, name: str, queries: int, seconds: float, cpu_seconds: float) -> Row:
        row = self._rows.setdefault(name, Row(name))
        row.rates.append(queries / seconds)
        row.cpu_ms.append(1000 * cpu_seconds / queries)
        return row

    def _in_process(self, name: str, way: str, batch: int) -> None:
        queries = (self._work.queries * 100)[: self._count(name, min(batch, len(self._work.queries)))]
        cpu = self._bare.cpu_seconds()
        answer = self._bare.ask(way, queries, batch)
        self._note(name, len(queries), answer["seconds"], self._bare.cpu_seconds() - cpu)

    def _answers_of(self, queries: Sequence[str]) -> list[Any]:
        return self._bare.ask("engine", queries, _SERVER.batch_queries)["hits"]

    def _over_http(self, name: str, process: Process, **how: Any) -> None:
        job = {"bodies": self._bodies(self._work.queries), "requests": self._count(name, 2 * how.get("clients", 50))}
        self._ask(name, process, {**job, **how}, self._expected)

    def _in_groups(self, name: str, number: int) -> None:
        """Ask queries that no round before has asked, each several times in a row, as rollouts of one question do."""
        count = min(self._count(name, 2 * _CLIENTS * _GROUP) // _GROUP, len(self._work.queries))
        fresh = [f"{text} {_NUMBERS[number % len(_NUMBERS)]}" for text in self._work.queries[:count]]
        repeated = [text for text in fresh for _ in range(_GROUP)]
        job = {"bodies": self._bodies(repeated), "requests": len(repeated), "clients": _CLIENTS}
        self._ask(name, self._cached, job, [hits for hits in self._answers_of(fresh) for _ in range(_GROUP)])

    def _bodies(self, queries: Sequence[str]) -> list[str]:
        topk = self._work.topk
        return [json.dumps({"queries": [text], "topk": topk, "return_scores": True}) for text in queries]

    def _ask(self, name: str, process: Process, job: dict[str, Any], expected: Sequence[Any]) -> None:
        cpu, count = process.cpu_seconds(), job["requests"]
        outcome = ask({"port": process.port, **job}, self._work.cpus[1])
        row = self._note(name, count, outcome["seconds"], process.cpu_seconds() - cpu)
        row.latencies_ms += [1000 * seconds for seconds in outcome["latencies"]]
        if outcome["statuses"] != {"200": count}:
            raise SystemExit(f"{name}: statuses {outcome['statuses']}")
        for number, body in outcome["answers"].items():
            (hits,) = json.loads(body)["result"]
            found = [[hit["document"]["id"] for hit in hits], [hit["score"] for hit in hits]]
            (_check_nearly if name == NAIVE else _check)(name, found, expected[int(number)])

    def _by_client(self, name: str) -> None:
        queries = (self._work.queries * 100)[: self._count(name, 2 * _CLIENTS)]
        cpu, start = self._service.cpu_seconds(), time.perf_counter()
        results = asyncio.run(
            _ask_by_client(f"http://127.0.0.1:{self._service.port}/retrieve", queries, self._work.topk)
        )
        seconds = time.perf_counter() - start
        self._note(name, len(queries), seconds, self._service.cpu_seconds() - cpu)
        for number, result in enumerate(results):
            hits = [[doc.id for doc in result.documents], list(result.scores)]
            _check(name, hits, self._expected[number % len(self._expected)])


def _check(name: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise SystemExit(f"{name}: got {found}; the engine says {expected}")


def _check_nearly(name: str, found: Any, expected: Any) -> None:
    """Compare scores up to rounding, and documents wherever the scores beside theirs are others."""
    (ids, scores), (wanted_ids, wanted) = found, expected
    scores, ids = scores[: len(wanted)], ids[: len(wanted)]  # bm25s fills up with documents of score 0
    near = [abs(a - b) <= _NEAR * max(1.0, abs(b)) for a, b in zip(scores, wanted, strict=True)]
    gaps = [True, *(a - b > 4 * _NEAR * max(1.0, a) for a, b in pairwise(wanted)), False]  # the last may tie beyond
    pairs = zip(ids, wanted_ids, gaps[:-1], gaps[1:], strict=True)
    alike = [a == b for a, b, above, below in pairs if above and below]
    if not (all(near) and all(alike)):
        raise SystemExit(f"{name}: got {found}; the engine says {expected}")


async def _ask_by_client(url: str, queries: Sequence[str], topk: int) -> list[Any]:
    """Share the queries out over callers that each wait for an answer before they ask again."""
    results: dict[int, Any] = {}
    waiting = iter(enumerate(queries))
    async with RetrieverClient(RetrieverClientConfig(url=url)) as client:

        async def call() -> None:
            for number, query in waiting:
                (results[number],) = await client([query], topk)

        await asyncio.gather(*(call() for _ in range(_CLIENTS)))
    return [results[number] for number in range(len(queries))]


def report(title: str, rows: Sequence[Row]) -> str:
    """Lay out the rows with their ratios, and say what became of the targets."""
    of = {row.name: row for row in rows}
    library, engine, naive, one, many, groups = (of[name] for name in (LIBRARY, ENGINE, NAIVE, SERVICE, MANY, GROUPS))
    columns = ("queries/s", "of library", "of engine", "cpu ms", "p50 ms", "p99 ms")
    lines = [f"\n{title:<34}" + "".join(f"{column:>12}" for column in columns)]
    for row in rows:
        cells = [f"{row.rate:.1f}", f"{row.rate / library.rate:.2f}", f"{row.rate / engine.rate:.2f}", f"{row.cpu:.3f}"]
        cells += [f"{row.quantile_ms(share):.1f}" for share in (0.5, 0.99) if row.latencies_ms]
        lines.append(f"  {row.name:<32}" + "".join(f"{cell:>12}" for cell in cells))
    ratios = [one.rate / library.rate, many.rate / library.rate, library.cpu / one.cpu, library.cpu / many.cpu]
    added = one.cpu - engine.cpu
    limits = [2.5 * ms + _SERVER.batch_window_ms for ms in (of[ALONE].quantile_ms(0.5), 1000 / of[SINGLE].rate)]
    of_clients = of[LIBRARY_OF_CLIENTS]
    lines += [
        "  service of library, 32 and 1000 clients: {:.2f}, {:.2f}; by CPU time {:.2f}, {:.2f}".format(*ratios),
        f"  service, 32 clients, of library in batches of 32: {one.rate / of_clients.rate:.2f}; by CPU time "
        f"{of_clients.cpu / one.cpu:.2f}",
        f"  service adds {added:.3f} ms of CPU to a query: 0.90 of an engine that takes {9 * added:.2f} ms or more",
        *(
            f"  service of {row.name}, 32 and 1000 clients, cache and groups: {one.rate / row.rate:.1f} x, "
            f"{many.rate / row.rate:.1f} x, {groups.rate / row.rate:.1f} x; by CPU time {row.cpu / one.cpu:.1f} x, "
            f"{row.cpu / many.cpu:.1f} x, {row.cpu / groups.cpu:.1f} x"
            for row in (naive, of[NAIVE_ENGINE])
        ),
        "  p99 at half load: {:.1f} ms; 2.5 x one query alone + window: {:.1f} ms (the service's), {:.1f} ms "
        "(the engine's)".format(of[EVEN].quantile_ms(0.99), *limits),
    ]
    return "\n".join(lines)


def measure(retriever: str, documents: int, args: argparse.Namespace) -> str:
    """Build the index, start the processes, measure, report."""
    usable = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        rare_words = 20_000 if retriever == "bm25" else 0
        queries = write_world(folder / "corpus.jsonl", documents, _QUERIES, rare_words, random.Random(args.seed))
        corpus = Corpus.open(folder / "corpus.jsonl")
        (build_index if retriever == "bm25" else index_random)(corpus, retriever, folder / "index")
        os.sched_setaffinity(0, {usable[-1]})
        work = Work(queries, args.topk, args.seconds, args.rounds, (usable[0], usable[-1]))
        rows = Bench(retriever, folder / "index", corpus.path, work, stack).run()
    os.sched_setaffinity(0, usable)
    return report(f"{retriever}, {documents} documents", rows)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description="Benchmark the retriever service against its engine.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--retrievers", nargs="+", default=["bm25", "minilm"], help="which engines")
    parser.add_argument("--documents", type=int, default=100_000, help="size of the corpus")
    parser.add_argument("--topk", type=int, default=8, help="documents per query")
    parser.add_argument("--rounds", type=int, default=3, help="how often every row is measured")
    parser.add_argument("--seconds", type=float, default=1.5, help="about how long a row takes in a round")
    parser.add_argument("--seed", type=int, default=0, help="of corpus and queries")
    args = parser.parse_args()
    logging.getLogger("verl").setLevel(logging.ERROR)
    stop_in_order()
    for retriever in args.retrievers:
        found = measure(retriever, args.documents, args)
        sys.stdout.write(found + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
