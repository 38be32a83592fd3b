"""Ask the retriever service for a long time and see whether its memory stays flat.

    python scripts/bench/retriever_soak.py --queries 200000
    python scripts/bench/retriever_soak.py --retriever hybrid --documents 50000 --queries 20000

A server process over a made-up corpus, with BM25, a dense index of random vectors (minilm) or both fused, gets queries
in rounds from 64 connections: mostly new ones, some that were asked before, with all kinds of `topk`, and now and then
a request that is wrong. After every round its resident memory is read, and at the end a line is fitted through the
readings, without the first quarter, in which caches and the allocator fill up. Memory counts as flat when the line
rises by less than 2 % over all rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from retriever_load import Load
from retriever_parts import Process, index_random, server, stop_in_order, write_world

from verl.retrieval.build import build_index
from verl.retrieval.corpus import Corpus
from verl.retrieval.metrics import resident_bytes
from verl.services import free_port

_CLIENTS = 64
_RARE_WORDS = 2000
_WARM_UP = 0.25
_FLAT = 0.02
_INDEXES = {"bm25": ("bm25",), "minilm": ("minilm",), "hybrid": ("bm25", "minilm")}
_WRONG = ('{"queries": []}', '{"queries": ["q"], "topk": 0}', '{"queries": [" "]}', "[", '{"queries": ["q"], "x": 1}')


def bodies(vocabulary: Sequence[str], asked_before: list[str], count: int, rng: random.Random) -> list[str]:
    """Return one round's requests."""
    made: list[str] = []
    for _ in range(count):
        kind = rng.random()
        if kind < 0.03:
            made.append(rng.choice(_WRONG))
            continue
        query = rng.choice(asked_before) if kind < 0.2 and asked_before else " ".join(rng.choices(vocabulary, k=6))
        made.append(json.dumps({"queries": [query], "topk": rng.choice((1, 3, 8, 8, 8, 20)), "return_scores": True}))
        if len(asked_before) < 20_000:
            asked_before.append(query)
    return made


def soak(process: Process, vocabulary: Sequence[str], args: argparse.Namespace) -> list[float]:
    """Run all rounds; return the resident memory after each, in MiB."""
    rng, asked_before, resident = random.Random(args.seed), [], []
    per_round = args.queries // args.rounds
    for number in range(1, args.rounds + 1):
        job = {"bodies": bodies(vocabulary, asked_before, per_round, rng), "requests": per_round, "clients": _CLIENTS}
        outcome = asyncio.run(Load({"port": process.port, **job}).run())
        unexpected = set(outcome.statuses) - {200, 400, 422}
        if unexpected:
            raise SystemExit(f"round {number}: statuses {outcome.statuses}")
        resident.append(resident_bytes(process.popen.pid) / 2**20)
        rate = per_round / outcome.seconds
        sys.stdout.write(f"{number * per_round:>9} queries  {rate:>8.0f} a second  {resident[-1]:>8.1f} MiB\n")
        sys.stdout.flush()
    return resident


def build(corpus: Corpus, retriever: str, folder: Path) -> list[Path]:
    """Write the retriever's indexes; return where they are."""
    for name in _INDEXES[retriever]:
        if name == "bm25":
            build_index(corpus, name, folder / name)
        else:
            index_random(corpus, name, folder / name)
    return [folder / name for name in _INDEXES[retriever]]


def verdict(resident: Sequence[float]) -> tuple[bool, str]:
    """Say whether memory stayed flat, and how much it rose."""
    settled = resident[int(_WARM_UP * len(resident)) :]
    slope = statistics.linear_regression(range(len(settled)), settled).slope
    rise = slope * len(resident)
    flat = rise < _FLAT * resident[-1]
    shown = f"{rise:+.1f} MiB over all rounds at the rate of the last {len(settled)}; "
    shown += f"{resident[0]:.1f} MiB after the first round, {resident[-1]:.1f} MiB after the last"
    return flat, f"memory is {'flat' if flat else 'NOT flat'}: {shown}"


def main() -> int:
    """Run the soak; the exit code is 1 when memory grew."""
    parser = argparse.ArgumentParser(
        description="Soak the retriever service.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--retriever", choices=tuple(_INDEXES), default="bm25", help="what is searched")
    parser.add_argument("--queries", type=int, default=200_000, help="in all")
    parser.add_argument("--rounds", type=int, default=40, help="after each, memory is read")
    parser.add_argument("--documents", type=int, default=2000, help="size of the corpus")
    parser.add_argument("--seed", type=int, default=0, help="of corpus and queries")
    args = parser.parse_args()
    logging.getLogger("verl").setLevel(logging.ERROR)
    stop_in_order()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        queries = write_world(folder / "corpus.jsonl", args.documents, 512, _RARE_WORDS, random.Random(args.seed))
        corpus = Corpus.open(folder / "corpus.jsonl")
        paths = build(corpus, args.retriever, folder)
        flags = ("--index_path", *paths, "--corpus_path", corpus.path, "--retriever_name", args.retriever)
        with server(("-m", "verl.retrieval.server", *flags), free_port()) as process:
            resident = soak(process, sorted({word for query in queries for word in query.split()}), args)
    flat, shown = verdict(resident)
    sys.stdout.write(shown + "\n")
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
