"""Measure the corpus store on synthetic passages: conversion, opening, memory and random fetches, in one run.

    python scripts/bench/corpus.py                       # 200,000 passages, under a minute
    python scripts/bench/corpus.py --passages 5000000    # minutes, and 4 GB under --folder

Conversion is compared with the least that any reader of jsonl does (`json.loads` of every line, on a tenth of the
passages), and the whole corpus with that tenth: opening time and own memory should not grow with the corpus. Every
opening runs in a process of its own. `mapped` is the part of the resident memory that belongs to the page cache.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from verl.retrieval.corpus import Corpus

_SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
_FETCHES_PER_QUERY = 10
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Opening:
    """What a process saw that opened a converted corpus and fetched random documents.

    Attributes:
        own_mib: growth of its anonymous memory over opening and fetching.
        mapped_mib: growth of the file pages that it maps.
        single_per_s: documents fetched in a second of CPU time, one at a time.
        by_ten_per_s: the same through `rows`, ten at a time.
    """

    open_s: float
    own_mib: float
    mapped_mib: float
    single_per_s: float
    by_ten_per_s: float


def write_passages(path: Path, passages: int, rng: random.Random) -> None:
    """Write a jsonl corpus of passages of 20 to 60 words."""
    words = ["".join(rng.choices(_SYLLABLES, k=rng.randint(2, 4))) for _ in range(20_000)]
    sentences = [" ".join(rng.choices(words, k=rng.randint(10, 30))) for _ in range(20_000)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(passages):
            contents = f'"{words[number % len(words)]}"\n{rng.choice(sentences)} {rng.choice(sentences)}'
            file.write(json.dumps({"id": str(number), "contents": contents}) + "\n")


def convert(path: Path) -> float:
    """Convert a corpus; returns the seconds."""
    start = time.perf_counter()
    Corpus.open(path)
    return time.perf_counter() - start


def parse(path: Path) -> float:
    """Parse every line of a jsonl file and drop it; returns the seconds."""
    start = time.perf_counter()
    with path.open("rb") as file:
        for line in file:
            json.loads(line)
    return time.perf_counter() - start


def open_and_fetch(path: Path, fetches: int, seed: int) -> Opening:
    """Open a converted corpus and fetch random documents."""
    before = _memory_kib()
    start = time.perf_counter()
    corpus = Corpus.open(path)
    open_s = time.perf_counter() - start
    rng = random.Random(seed)
    rows = [rng.randrange(len(corpus)) for _ in range(fetches)]
    start = time.process_time()
    for row in rows:
        corpus[row]
    single_s = time.process_time() - start
    start = time.process_time()
    for first in range(0, fetches, _FETCHES_PER_QUERY):
        corpus.rows(rows[first : first + _FETCHES_PER_QUERY])
    by_ten_s = time.process_time() - start
    own, mapped = (after - former for after, former in zip(_memory_kib(), before, strict=True))
    return Opening(open_s, own / 1024, mapped / 1024, fetches / single_s, fetches / by_ten_s)


def _memory_kib() -> tuple[int, int]:
    """Return this process's anonymous and its file-backed resident memory (Linux)."""
    status = Path("/proc/self/status").read_text("ascii")
    found = dict(line.split(":", 1) for line in status.splitlines())
    return int(found["RssAnon"].split()[0]), int(found["RssFile"].split()[0])


def in_fresh_process(path: Path, fetches: int) -> Opening:
    """Run `open_and_fetch` in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(open_and_fetch, path, fetches, 0).result()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure the corpus store.")
    parser.add_argument("--passages", type=int, default=200_000)
    parser.add_argument("--fetches", type=int, default=100_000)
    parser.add_argument("--folder", help="where the files go for the time of the run (default: the temporary folder)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        tenth, whole = Path(folder) / "tenth.jsonl", Path(folder) / "whole.jsonl"
        for path, passages in ((tenth, max(args.passages // 10, 1)), (whole, args.passages)):
            write_passages(path, passages, random.Random(0))
        size, tenth_size = whole.stat().st_size / _MIB, tenth.stat().st_size / _MIB
        parse_rate = tenth_size / parse(tenth)
        convert(tenth)
        rate = size / convert(whole)
        print(f"corpus            {args.passages:,} passages, {size:,.0f} MiB of jsonl")
        print(
            f"conversion        {rate:,.0f} MiB/s   {rate / parse_rate:.2f} x bare json.loads ({parse_rate:,.0f} MiB/s)"
        )
        small, large = in_fresh_process(tenth, args.fetches), in_fresh_process(whole, args.fetches)
    print(f"opening           {large.open_s * 1e3:.1f} ms   {large.open_s / small.open_s:.2f} x that of a tenth")
    print(f"own memory        +{large.own_mib:.1f} MiB   a tenth: +{small.own_mib:.1f} MiB")
    print(f"mapped            +{large.mapped_mib:.1f} MiB   a tenth: +{small.mapped_mib:.1f} MiB")
    for name, value, former in (
        ("fetch, one row", large.single_per_s, small.single_per_s),
        ("fetch, ten rows", large.by_ten_per_s, small.by_ten_per_s),
    ):
        print(f"{name:<17} {value:,.0f} documents per CPU second   {value / former:.2f} x that of a tenth")


if __name__ == "__main__":
    main()
