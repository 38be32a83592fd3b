"""Measure whether precomputing naive RAG is as fast as the services it asks, as ratios within one run.

    python scripts/bench/precompute.py --questions 10000

Retriever (BM25 over the embedded world) and frozen generator (the tiny one, on vLLM) run as services. Each is fed
alone: all questions in full requests, and all finished prompts by a bare HTTP client. `data_preprocess.rag_cache` does
the whole job. Both happen in turns on one slice of the questions after the other, so that other work on the machine
slows both alike, and the services' caches are off, so that neither finds what the other has asked. With two or more
CPUs the services share the last one and this process has the others, so the services' times add up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from data_preprocess.rag_cache import RagCacheConfig, run
from data_preprocess.train_filter import TrainFilter
from data_preprocess.world.build import WorldConfig, build
from generator_llms import prompts
from generator_llms.config import GeneratorConfig
from verl.evaluation.collect import RunConfig
from verl.records import read_questions, write_questions
from verl.retrieval.build import build_index
from verl.retrieval.client import RetrieverClientConfig
from verl.retrieval.corpus import Corpus
from verl.retrieval.wire import RetrieveRequest, parse_response, request_body
from verl.services import Service, free_ports, generator_service, retriever_service, running
from verl.types import Question, SearchResult

_ROOT = Path(__file__).resolve().parents[2]
_GENERATOR = _ROOT / "data_preprocess" / "world" / "checkpoints" / "generator"
_SERVED = "generator"
_TOPK = 12
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Asked:
    """How the services are asked.

    Attributes:
        batch: queries in one request to the retriever.
        concurrency: requests to the generator in flight.
    """

    batch: int
    concurrency: int
    max_tokens: int


async def retrieve_all(url: str, questions: Sequence[Question], asked: Asked) -> list[SearchResult]:
    """Search for every question in full requests, two in flight."""
    slots = asyncio.Semaphore(2)

    async def one(client: httpx.AsyncClient, batch: Sequence[Question]) -> list[SearchResult]:
        texts = tuple(question.text for question in batch)
        async with slots:
            answer = await client.post(url, content=request_body(RetrieveRequest(texts, _TOPK, return_scores=True)))
        answer.raise_for_status()
        return parse_response(answer.content, texts, _TOPK)

    async with httpx.AsyncClient(timeout=600, trust_env=False) as client:
        batches = [questions[start : start + asked.batch] for start in range(0, len(questions), asked.batch)]
        return [
            result for found in await asyncio.gather(*(one(client, batch) for batch in batches)) for result in found
        ]


async def generate_all(url: str, bodies: Sequence[bytes], asked: Asked) -> None:
    """Send every request, so many in flight, and read the answers without looking at them."""
    limits = httpx.Limits(max_connections=asked.concurrency, max_keepalive_connections=asked.concurrency)
    waiting = iter(bodies)
    headers = {"Content-Type": "application/json"}

    async def worker(client: httpx.AsyncClient) -> None:
        for body in waiting:
            (await client.post(f"{url}/v1/chat/completions", content=body, headers=headers)).raise_for_status()

    async with httpx.AsyncClient(timeout=600, limits=limits, trust_env=False) as client:
        await asyncio.gather(*(worker(client) for _ in range(asked.concurrency)))


def bodies_of(questions: Sequence[Question], found: Sequence[SearchResult], asked: Asked) -> list[bytes]:
    """Return the requests that naive RAG sends to the generator."""
    bodies = []
    for question, result in zip(questions, found, strict=True):
        messages = prompts.build("context", question, result.documents[:_SHOWN])
        request = {"model": _SERVED, "messages": messages, "max_tokens": asked.max_tokens, "temperature": 0.0}
        bodies.append(json.dumps(request).encode())
    return bodies


def alone(questions: Sequence[Question], retriever: Service, generator: Service, asked: Asked) -> tuple[float, float]:
    """Feed each service alone; return the seconds of both."""
    began = time.perf_counter()
    found = asyncio.run(retrieve_all(f"{retriever.url}/retrieve", questions, asked))
    retrieval = time.perf_counter() - began
    bodies = bodies_of(questions, found, asked)
    began = time.perf_counter()
    asyncio.run(generate_all(generator.url, bodies, asked))
    return retrieval, time.perf_counter() - began


def whole(folder: Path, questions: Sequence[Question], retriever: Service, generator: Service, asked: Asked) -> float:
    """Precompute; return the seconds."""
    write_questions(folder / "questions.parquet", questions, "train")
    config = RagCacheConfig(
        questions=folder / "questions.parquet",
        output=folder / "out.parquet",
        split="train",
        filter=TrainFilter.none(),
        retriever=RetrieverClientConfig(url=f"{retriever.url}/retrieve", batch_queries=asked.batch),
        generator=GeneratorConfig(
            base_url=f"{generator.url}/v1",
            max_tokens=asked.max_tokens,
            max_prompt_tokens=900,
            concurrency=asked.concurrency,
        ),
        run=RunConfig(concurrency=asked.batch),
    )
    began = time.perf_counter()
    asyncio.run(run(config))
    return time.perf_counter() - began


def measure(
    folder: Path, questions: Sequence[Question], retriever: Service, generator: Service, asked: Asked, slices: int
) -> str:
    """Take the questions a slice at a time, services alone and precompute in changing order; return the table."""
    alone(questions[: asked.concurrency], retriever, generator, asked)  # warm
    size = -(-len(questions) // slices)
    parts = [questions[start : start + size] for start in range(0, len(questions), size)]
    rows: list[tuple[float, float, float]] = []
    for number, part in enumerate(parts):
        place = folder / f"slice_{number}"
        place.mkdir()
        if number % 2:
            precomputed = whole(place, part, retriever, generator, asked)
            rows.append((*alone(part, retriever, generator, asked), precomputed))
        else:
            services = alone(part, retriever, generator, asked)
            rows.append((*services, whole(place, part, retriever, generator, asked)))
    return table(len(questions), rows, asked)


def table(count: int, rows: Sequence[tuple[float, float, float]], asked: Asked) -> str:
    """Return the sums over the slices, and the ratio over all and of each slice."""
    retrieval, generation, precomputed = (sum(column) for column in zip(*rows, strict=True))
    timed = [
        ("retriever alone, full requests", retrieval),
        ("generator alone, bare client", generation),
        ("both, one after the other", retrieval + generation),
        ("precompute", precomputed),
    ]
    ratios = [(r + g) / p for r, g, p in rows]
    lines = [f"{count} questions in {len(rows)} slices, {asked.batch} queries a request, {asked.concurrency} in flight"]
    lines += [f"  {name:<34}{seconds:>8.1f} s{count / seconds:>10.1f} questions/s" for name, seconds in timed]
    lines.append(
        f"  share of the services' own throughput: {(retrieval + generation) / precomputed:.2f} (slices: median "
        f"{statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f})"
    )
    return "\n".join(lines)


def numbered(questions: Sequence[Question], count: int) -> list[Question]:
    """Return `count` questions, the world's over and over under new ids."""
    return [replace(questions[n % len(questions)], id=f"world/train/{n}") for n in range(count)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--slices", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1024, help="queries in one request to the retriever")
    parser.add_argument("--concurrency", type=int, default=128, help="requests to the generator in flight")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    cpus = sorted(os.sched_getaffinity(0))
    asked = Asked(args.batch, args.concurrency, max_tokens=48)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = build(WorldConfig(train=1200), folder / "world")
        questions = numbered(read_questions(files.questions("train")), args.questions)
        build_index(Corpus.open(files.corpus), "bm25", folder / "bm25")
        ports = free_ports(2)
        retriever = retriever_service(
            folder / "bm25", files.corpus, "bm25", _TOPK, ports[0], folder / "retriever.log", startup_timeout=300
        )
        generator = generator_service(
            str(_GENERATOR), ports[1], folder / "generator.log", 960, "cpu", "float32", served_model_name=_SERVED
        )
        retriever = replace(retriever, command=(*retriever.command, "--cache_mb", "0"))
        generator = replace(generator, command=(*generator.command, "--no-enable-prefix-caching"))
        if len(cpus) > 1:
            os.sched_setaffinity(0, cpus[-1:])  # inherited by the services
        with running(retriever, generator):
            os.sched_setaffinity(0, cpus[:-1] or cpus)
            sys.stdout.write(measure(folder, questions, retriever, generator, asked, args.slices) + "\n")


if __name__ == "__main__":
    main()
