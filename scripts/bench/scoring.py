"""Time the scoring of trajectories: all at once against a serial loop, the ideal, and the cache.

    python scripts/bench/scoring.py [--trajectories 120] [--latency-ms 200] [--concurrency 32] [--repeats 5]

A local server answers every request after a fixed latency: a generation with a wrong answer, the judge with something
unclear and then, asked again, with "no". So every trajectory costs one generation and two judge calls, one after the
other, the most there can be. The ideal is what the latency alone allows at that concurrency. Every repeat has a client
of its own, whose connections are set up within the time; medians count. The serial loop, whose time grows with the
trajectories, is timed on a few of them. Server and scoring are one process each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

from generator_llms.client import GeneratorClient
from generator_llms.config import GeneratorConfig
from generator_llms.judge import LLMJudge
from verl.errors import GeneratorError
from verl.rewards.registry import RewardConfig, Scorer
from verl.types import Baseline, Document, Question, RewardOutcome, Stop, Trajectory

logger = logging.getLogger("bench.scoring")

CALLS = 3
"""Requests per trajectory: one generation, two judge calls."""
CACHED_REPEATS = 25
"""Passes over the cache: one is milliseconds."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured; `serial` trajectories are scored one after the other."""

    trajectories: int
    latency_ms: float
    concurrency: int
    repeats: int
    serial: int = 12

    @property
    def ideal_s(self) -> float:
        """Requests go out in full waves, and those of one trajectory need a wave each."""
        waves = math.ceil(self.trajectories * CALLS / self.concurrency)
        return max(waves, CALLS) * self.latency_ms / 1000


def serve(latency_ms: float, ready: Connection) -> None:
    """Run the server until killed; tells its port once it listens."""
    asyncio.run(_serve(latency_ms / 1000, ready))


async def _serve(latency_s: float, ready: Connection) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(latency_s), "127.0.0.1", 0, backlog=1024)
    ready.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


class _Connection(asyncio.Protocol):
    """HTTP of the barest kind, so that the server takes no time worth mentioning from what is measured."""

    def __init__(self, latency_s: float) -> None:
        self._latency_s = latency_s
        self._received = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, rest = self._received.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
        if not end or len(rest) < length:
            return
        self._received = rest[length:]
        if head.startswith(b"GET"):
            self._send({"object": "list", "data": [{"id": "bench", "object": "model"}]})
            return
        last = json.loads(rest[:length])["messages"]
        said = "no" if len(last) > 2 else "yes and no" if "Response:" in last[-1]["content"] else "I do not know."
        message = {"role": "assistant", "content": said}
        reply = {"model": "bench", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        asyncio.get_running_loop().call_later(self._latency_s, self._send, reply)

    def _send(self, payload: object) -> None:
        body = json.dumps(payload).encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        if self._transport is not None:
            self._transport.write(head + body)


def make_trajectories(count: int) -> list[Trajectory]:
    """Return different trajectories with contexts of the usual size: six documents of 150 words."""
    made = []
    for index in range(count):
        documents = tuple(Document(f"{index}-{i}", f"Title {i}", f"fact {index} of " * 50) for i in range(6))
        baseline = Baseline(documents[:3], "?", correct=False)
        question = Question(f"bench/{index}", f"What is number {index}?", ("Paris",), "bench", baseline=baseline)
        made.append(Trajectory(question, (1,), (), Stop.FINISHED, documents))
    return made


async def score_all(config: GeneratorConfig, trajectories: Sequence[Trajectory], at_once: bool) -> float:
    """Score every trajectory and return the seconds it took, the start of the client not counted."""
    async with GeneratorClient(config) as client:
        scorer = Scorer(RewardConfig(), client.answer, LLMJudge(client.complete))
        await client.ready()
        started = time.perf_counter()
        if at_once:
            outcomes: list[RewardOutcome] = await asyncio.gather(*map(scorer, trajectories))
        else:
            outcomes = [await scorer(trajectory) for trajectory in trajectories]
        seconds = time.perf_counter() - started
        sent = client.stats.requests + client.stats.cached
    failed = [outcome.failed for outcome in outcomes if outcome.failed]
    if failed:
        raise GeneratorError(f"{len(failed)} of {len(outcomes)} trajectories were not scored: {failed[0]}")
    if sent != CALLS * len(trajectories):
        raise GeneratorError(f"{sent} requests for {len(trajectories)} trajectories, expected {CALLS} for each")
    return seconds


async def measure(settings: Settings, base_url: str, folder: Path) -> str:
    """Run every variant and return the table."""
    trajectories = make_trajectories(settings.trajectories)
    plain = GeneratorConfig(base_url, model="bench", concurrency=settings.concurrency)
    few = trajectories[: settings.serial]
    logger.info("serial loop over %d, about %.0f s", len(few), len(few) * CALLS * settings.latency_ms / 1000)
    serial = await score_all(plain, few, at_once=False) * len(trajectories) / len(few)
    parallel = [await score_all(plain, trajectories, at_once=True) for _ in range(settings.repeats)]
    first, again = [], []
    for repeat in range(settings.repeats):
        cached = replace(plain, cache_path=folder / f"{repeat}.sqlite")
        first.append(await score_all(cached, trajectories, at_once=True))
    for _ in range(CACHED_REPEATS):
        again.append(await score_all(cached, trajectories, at_once=True))
    return table(settings, serial, parallel, first, again)


def table(
    settings: Settings, serial: float, parallel: Sequence[float], first: Sequence[float], again: Sequence[float]
) -> str:
    """Return the seconds of every variant (median, least and most) and their ratios beside what is to be reached."""
    ideal, fresh = settings.ideal_s, statistics.median(first)
    middle = statistics.median(parallel)
    requests = settings.trajectories * CALLS
    rows = [
        ("serial loop", [serial], f"from {settings.serial} trajectories"),
        ("ideal", [ideal], f"{requests} requests, {settings.concurrency} in flight"),
        ("all at once", parallel, f"{middle / ideal:.2f} x ideal (<= 1.3), {serial / middle:.1f} x serial (>= 20)"),
        ("first time, with cache", first, f"{fresh / ideal:.2f} x ideal"),
        ("again, from cache", again, f"{fresh / statistics.median(again):.0f} x faster (>= 100)"),
    ]
    head = f"{settings.trajectories} trajectories, {CALLS} requests each, {settings.latency_ms:g} ms latency"
    lines = [
        f"{name:<24}{statistics.median(seconds):>9.3f} s  [{min(seconds):.3f}, {max(seconds):.3f}]  {note}"
        for name, seconds, note in rows
    ]
    return "\n".join([head, *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and write its table to stdout."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trajectories", type=int, default=120)
    parser.add_argument("--latency-ms", type=float, default=200.0)
    parser.add_argument("--concurrency", type=int, default=GeneratorConfig().concurrency)
    parser.add_argument("--repeats", type=int, default=5)
    settings = Settings(**vars(parser.parse_args(argv)))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    context = multiprocessing.get_context("spawn")
    ready, told = context.Pipe(duplex=False)
    server = context.Process(target=serve, args=(settings.latency_ms, told), daemon=True)
    server.start()
    try:
        if not ready.poll(60):
            raise GeneratorError("the benchmark's server did not start within 60 s; run it on a less busy machine")
        with tempfile.TemporaryDirectory() as folder:
            table = asyncio.run(measure(settings, f"http://127.0.0.1:{ready.recv()}/v1", Path(folder)))
    finally:
        server.terminate()
        server.join()
    sys.stdout.write(table + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
