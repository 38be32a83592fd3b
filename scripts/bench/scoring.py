"""Time the scoring of trajectories: all at once against a serial loop, the ideal, and the cache.

    python scripts/bench/scoring.py [--trajectories 120] [--latency-ms 200] [--concurrency 32]

A local server answers every chat request after a fixed latency, first with a wrong answer and then, to the judge, with
"no": every trajectory costs one generation and one judge call, as in the worst case of a first epoch. The ideal is
what the latency alone allows at that concurrency. Everything runs in one process but for the server.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from generator_llms.client import GeneratorClient
from generator_llms.config import GeneratorConfig
from generator_llms.judge import LLMJudge
from verl.errors import GeneratorError
from verl.rewards.registry import RewardConfig, Scorer
from verl.types import Baseline, Document, Question, RewardOutcome, Stop, Trajectory

logger = logging.getLogger("bench.scoring")

CALLS = 2
"""Requests per trajectory: one generation, one judge call."""
REPEATS = 5
"""Passes over the cache, of which the median counts: one pass is milliseconds."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured."""

    trajectories: int
    latency_ms: float
    concurrency: int

    @property
    def serial_ideal_s(self) -> float:
        return self.trajectories * CALLS * self.latency_ms / 1000

    @property
    def ideal_s(self) -> float:
        """Requests go out in full waves; a judge call follows its own generation, which needs no wave of its own."""
        waves = math.ceil(self.trajectories * CALLS / self.concurrency)
        return max(waves, CALLS) * self.latency_ms / 1000


def serve(latency_ms: float, ready: Connection) -> None:
    """Run the server until killed; tells its port once it listens."""
    import socket

    import uvicorn
    from fastapi import FastAPI

    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "bench", "object": "model"}]}

    @app.post("/v1/chat/completions")
    async def chat(request: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(latency_ms / 1000)
        judging = "Response:" in request["messages"][-1]["content"]
        message = {"role": "assistant", "content": "no" if judging else "I do not know."}
        return {"model": "bench", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(1024)
    ready.send(listener.getsockname()[1])
    uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listener])


def make_trajectories(count: int) -> list[Trajectory]:
    """Return different trajectories with contexts of the usual size: six documents of 100 words."""
    made = []
    for index in range(count):
        documents = tuple(Document(f"{index}-{i}", f"Title {i}", f"fact {index} " * 50) for i in range(6))
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
    failed = [outcome.failed for outcome in outcomes if outcome.failed]
    if failed:
        raise GeneratorError(f"{len(failed)} of {len(outcomes)} trajectories were not scored: {failed[0]}")
    return seconds


async def measure(settings: Settings, base_url: str, folder: Path) -> str:
    """Run every variant and return the table."""
    trajectories = make_trajectories(settings.trajectories)
    plain = GeneratorConfig(base_url, model="bench", concurrency=settings.concurrency)
    cached = GeneratorConfig(
        base_url, model="bench", concurrency=settings.concurrency, cache_path=folder / "replies.sqlite"
    )
    logger.info("serial loop, about %.0f s", settings.serial_ideal_s)
    serial = await score_all(plain, trajectories, at_once=False)
    parallel = await score_all(plain, trajectories, at_once=True)
    first = await score_all(cached, trajectories, at_once=True)
    again = statistics.median([await score_all(cached, trajectories, at_once=True) for _ in range(REPEATS)])
    rows = [
        ("serial loop", serial, ""),
        ("ideal", settings.ideal_s, f"{settings.trajectories * CALLS} requests, {settings.concurrency} in flight"),
        ("all at once", parallel, f"{parallel / settings.ideal_s:.2f} x ideal, {serial / parallel:.1f} x serial"),
        ("first time with cache", first, f"{first / settings.ideal_s:.2f} x ideal, {serial / first:.1f} x serial"),
        ("second time, from cache", again, f"{first / again:.0f} x the first time"),
    ]
    head = f"{settings.trajectories} trajectories, {CALLS} requests each, {settings.latency_ms:g} ms latency"
    return "\n".join([head, *(f"{name:<24}{seconds:>9.3f} s  {note}" for name, seconds, note in rows)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and write its table to stdout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trajectories", type=int, default=120)
    parser.add_argument("--latency-ms", type=float, default=200.0)
    parser.add_argument("--concurrency", type=int, default=GeneratorConfig().concurrency)
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
