"""Measure that a literature search keeps its rate, and loses no query to a service that fails now and then.

    python scripts/bench/literature.py
    python scripts/bench/literature.py --queries 100 --speed 10   # a clock that runs ten times as fast

Asks a local server in PubMed's format, with a key, as fast as the limit of 10 requests a second allows: 1,000 queries
take 100 s at least. Some requests are answered with 429 or 500, or not within the timeout. The server notes when each
request arrives; printed is the largest number of arrivals in any sliding second, and whether every query got exactly
the documents that the server's own search finds.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from verl.errors import RetrieverError
from verl.retrieval.engines.demo_records import Record, search
from verl.retrieval.engines.demo_server import Asked, DemoServer, Reply
from verl.retrieval.engines.literature import LiteratureConfig, LiteratureSearch, open_literature
from verl.retrieval.engines.service import ServiceConfig
from verl.types import Question, SearchResult

KEY = "bench-key-0123456789"
RATE = 10
TOPK = 3_000
WORDS = ("asthma", "migraine", "sepsis", "stroke", "aspirin", "metformin", "exercise", "mortality", "pain", "patients")


@dataclass(frozen=True, slots=True)
class Case:
    """One query, and the ids that it should find."""

    question: Question
    query: str
    expected: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of a run; times are seconds of the (scaled) clock."""

    queries: int
    lost: int
    wrong: int
    requests: int
    faults: int
    busiest_second: int
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the rate was kept and every query got its documents."""
        return self.lost == self.wrong == 0 and self.busiest_second <= RATE


class Faults:
    """Answers a share of the requests with 429 (every other one with Retry-After), 500, or too late; evenly."""

    def __init__(self, seed: int, share: float, late_s: float) -> None:
        self.given = 0
        self._draw = random.Random(seed)
        self._share = share
        self._replies = (
            Reply(b'{"error":"API rate limit exceeded","count":"11","limit":"10"}', 429),
            Reply(b"<html>busy</html>", 500),
            Reply(b"late", delay_s=late_s),
            Reply(b'{"error":"API rate limit exceeded"}', 429, {"Retry-After": "1"}),
            Reply(b"<html>busy</html>", 500),
            Reply(b"late", delay_s=late_s),
        )

    def __call__(self, _: Asked) -> Reply | None:
        """Return a fault or none; the server calls this for one request at a time."""
        if self._draw.random() >= self._share:
            return None
        self.given += 1
        return self._replies[self.given % len(self._replies)]


def cases(count: int, seed: int, literature: Sequence[Record]) -> list[Case]:
    """Return different queries with Boolean operators and a date limit each."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        first, second, third = draw.sample(WORDS, 3)
        query = f'({first} OR "{second}") {draw.choice(("AND", "NOT"))} {third} OR number{number}'
        until = f"{draw.randint(1992, 2019)}/{draw.randint(1, 12):02}/15"
        question = Question(f"bench/{number}", query, ("1",), "bench", extra={"pub_date": until})
        made.append(Case(question, query, tuple(record.pmid for record in search(query, literature, until))))
    return made


def busiest(moments: Sequence[float], window_s: float = 1.0) -> int:
    """Return the largest number of moments in any window, of which one end belongs to it."""
    ordered = sorted(moments)
    most = start = 0
    for end, moment in enumerate(ordered):
        while moment - ordered[start] >= window_s:
            start += 1
        most = max(most, end - start + 1)
    return most


async def ask(literature: LiteratureSearch, asked: Sequence[Case]) -> list[SearchResult | BaseException]:
    """Ask everything at once; the search keeps the rate."""
    calls = (literature.bound(case.question)([case.query], TOPK) for case in asked)
    answers = await asyncio.gather(*calls, return_exceptions=True)
    return [answer if isinstance(answer, BaseException) else answer[0] for answer in answers]


async def measure(queries: int, share: float, speed: float, seed: int, travel_s: float = 0.25) -> Measured:
    """Run it once.

    Args:
        share: of the requests that fail.
        speed: seconds of the clock in one real second.
        travel_s: longest that a request is taken to travel, in real seconds.
    """
    clock, sleep = scaled(speed)
    http = ServiceConfig(timeout_s=1.5, concurrency=64, attempts=6, travel_s=travel_s * speed)
    with DemoServer() as server:
        server.keys = (KEY,)
        faults = Faults(seed, share, late_s=2 * http.timeout_s)
        server.fault = faults
        asked = cases(queries, seed, server.literature)
        config = LiteratureConfig(base_url=server.url, http=http)
        start = clock()
        async with open_literature(config, {"NCBI_API_KEY": KEY}, clock, sleep) as literature:
            answers = await ask(literature, asked)
        seconds = clock() - start
        for error in [answer for answer in answers if isinstance(answer, BaseException)]:
            if not isinstance(error, RetrieverError):
                raise error
            logging.error("lost: %s", error)
        found = [None if isinstance(answer, BaseException) else answer for answer in answers]
        return Measured(
            queries=queries,
            lost=found.count(None),
            wrong=sum(
                result is not None and tuple(document.id for document in result.documents) != case.expected
                for result, case in zip(found, asked, strict=True)
            ),
            requests=len(server.asked),
            faults=faults.given,
            busiest_second=busiest([entry.moment * speed for entry in server.asked]),
            seconds=seconds,
        )


def scaled(speed: float) -> tuple[Callable[[], float], Callable[[float], asyncio.Future]]:
    """Return a clock that runs `speed` times as fast as the real one, and its sleep."""

    def sleep(seconds: float) -> asyncio.Future:
        return asyncio.ensure_future(asyncio.sleep(seconds / speed))

    return lambda: time.monotonic() * speed, sleep


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure from the command line; exit with 1 if the rate was exceeded or a query was lost."""
    parser = argparse.ArgumentParser(description="Rate and losses of a literature search.")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--faults", type=float, default=0.05, help="share of the requests that fail")
    parser.add_argument("--speed", type=float, default=1.0, help="seconds of the clock in one real second")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    found = asyncio.run(measure(args.queries, args.faults, args.speed, args.seed))
    print(f"{found.queries} queries in {found.seconds:.1f} s ({found.queries / found.seconds:.2f}/s of {RATE}/s)")
    print(f"{found.requests} requests, of which {found.faults} were answered with a fault")
    print(f"most requests in any sliding second: {found.busiest_second} (limit {RATE})")
    print(f"lost: {found.lost}; with other documents than expected: {found.wrong}")
    print("PASS" if found.passed else "FAIL")
    sys.exit(0 if found.passed else 1)


if __name__ == "__main__":
    main()
