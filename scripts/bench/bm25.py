"""Measure the BM25 engines against bare bm25s, on synthetic passages or a corpus of your own, in one run.

    python scripts/bench/bm25.py                                            # 100,000 passages
    python scripts/bench/bm25.py --passages 1000000 --queries 50 --no-build-baseline
    python scripts/bench/bm25.py --corpus_path corpus.jsonl --queries 500 --lucene

`bare` is `bm25s.BM25.retrieve` on the same index with the same terms, given to it ready made: it neither analyses the
query, nor orders ties, nor fetches the documents. Times are CPU seconds of the process, the best of the rounds, so that
other work on the machine matters little; Lucene's threads are all counted. `own` memory is anonymous: the mapped index
and corpus are not in it. The passages have Zipf-like words, the queries are six words in a row from random passages.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import random
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import bm25s
import numpy as np

from verl.retrieval import bm25
from verl.retrieval.bm25_analysis import Analyzer
from verl.retrieval.corpus import Corpus
from verl.retrieval.engine import Engine, IndexInfo
from verl.retrieval.settings import BM25Config, LuceneConfig

_SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
_BATCH = 64


@dataclass(frozen=True, slots=True)
class Built:
    """What building cost a process: wall-clock seconds, and the growth of its anonymous memory at its height."""

    seconds: float
    own_mib: float


def write_passages(path: Path, passages: int) -> None:
    """Write a jsonl corpus of passages of 40 to 100 words."""
    rng, numbers = random.Random(0), np.random.default_rng(0)
    words = ["".join(rng.choices(_SYLLABLES, k=rng.randint(2, 5))) for _ in range(max(20_000, passages // 5))]
    weights = 1 / (np.arange(len(words)) + 10)
    weights /= weights.sum()
    with path.open("w", encoding="utf-8") as file:
        for first in range(0, passages, 10_000):
            lengths = numbers.integers(40, 101, min(10_000, passages - first))
            drawn = iter(numbers.choice(len(words), int(lengths.sum()), p=weights).tolist())
            for number, length in enumerate(lengths.tolist(), start=first):
                text = " ".join(words[next(drawn)] for _ in range(length))
                file.write(f'{{"id": "d{number}", "title": "passage {number}", "text": "{text}"}}\n')


def ours(corpus: Corpus, folder: Path) -> None:
    """Build as the engine does."""
    bm25.write_index(corpus, folder, BM25Config()).save(folder)


def baseline(corpus: Corpus, folder: Path) -> None:
    """Build by `bm25s.BM25.index`, given the terms of all documents."""
    analyze, vocabulary = Analyzer(BM25Config()), {}
    terms = [[vocabulary.setdefault(t, len(vocabulary)) for t in analyze(d.contents)] for d in corpus.documents()]
    index = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
    index.index((terms, vocabulary), create_empty_token=False, show_progress=False)
    index.save(str(folder / "bm25"), show_progress=False)


def build(path: Path, folder: Path, write: Callable[[Corpus, Path], None]) -> Built:
    """Build in this process and watch its memory."""
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    corpus, before, highest = Corpus.open(path), _own_kib(), [0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            highest[0] = max(highest[0], _own_kib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    write(corpus, folder)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return Built(seconds, (highest[0] - before) / 1024)


def _own_kib() -> int:
    status = Path("/proc/self/status").read_text("ascii")
    return int(status.partition("RssAnon:")[2].split()[0])


def draw_queries(corpus: Corpus, count: int) -> list[str]:
    """Return runs of six words from random passages."""
    rng, queries = random.Random(1), []
    for document in corpus.rows([rng.randrange(len(corpus)) for _ in range(count)]):
        words = document.text.split()
        first = rng.randrange(max(1, len(words) - 6))
        queries.append(" ".join(words[first : first + 6]))
    return queries


def rate(queries: int, rounds: int, ask: Callable[[], object]) -> float:
    """Return queries per CPU second of the best round; the first call is not counted."""
    ask()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        ask()
        times.append(time.process_time() - start)
    return queries / min(times)


def rates(name: str, engine: Engine, queries: Sequence[str], topk: int, rounds: int) -> dict[str, float]:
    """Ask an engine one query at a time and in batches."""
    batches = [queries[first : first + _BATCH] for first in range(0, len(queries), _BATCH)]
    return {
        f"{name}, one by one": rate(len(queries), rounds, lambda: [engine.search([query], topk) for query in queries]),
        f"{name}, batches of {_BATCH}": rate(
            len(queries), rounds, lambda: [engine.search(batch, topk) for batch in batches]
        ),
    }


def bare_rates(folder: Path, queries: Sequence[str], topk: int, rounds: int) -> dict[str, float]:
    """Ask bm25s itself, with the terms of the queries."""
    index = bm25s.BM25.load(str(folder / "bm25"), mmap=True)
    analyze = Analyzer(BM25Config())
    terms = [[term for term in analyze(query) if term in index.vocab_dict] for query in queries]
    batches = [terms[first : first + _BATCH] for first in range(0, len(terms), _BATCH)]

    def ask(batch: list[list[str]]) -> object:
        return index.retrieve(batch, k=topk, show_progress=False)

    return {
        "bare, one by one": rate(len(queries), rounds, lambda: [ask([entry]) for entry in terms]),
        f"bare, batches of {_BATCH}": rate(len(queries), rounds, lambda: [ask(batch) for batch in batches]),
    }


def lucene_rates(
    corpus: Corpus, folder: Path, queries: Sequence[str], topk: int, rounds: int
) -> tuple[float, dict[str, float]]:
    """Build with Lucene, and ask it with one thread; returns the seconds of the build too."""
    from verl.retrieval import lucene

    folder.mkdir()
    start = time.perf_counter()
    info = lucene.write_index(corpus, folder, LuceneConfig(store_documents=False))
    seconds = time.perf_counter() - start
    engine = lucene.open_engine(folder, corpus, info, threads=1)
    found = rates("lucene", engine, queries, topk, rounds)
    engine.close()
    return seconds, found


def measure(args: argparse.Namespace, folder: Path) -> None:
    """Build, search and print."""
    path = Path(args.corpus_path or folder / "corpus.jsonl")
    if args.corpus_path is None:
        write_passages(path, args.passages)
    corpus = Corpus.open(path)
    print(f"corpus                    {len(corpus):,} passages")
    built: dict[str, Built] = {}
    for name, write in (("ours", ours), ("baseline", baseline)):
        if name == "ours" or args.build_baseline:
            (folder / name).mkdir()
            # In a process of its own, so that its memory is that of the build alone.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                built[name] = pool.submit(build, path, folder / name, write).result()
            print(f"build, {name:<18} {built[name].seconds:.1f} s, +{built[name].own_mib:,.0f} MiB own memory")
    queries = draw_queries(corpus, args.queries)
    engine = bm25.open_engine(folder / "ours", corpus, IndexInfo.load(folder / "ours"))
    found = bare_rates(folder / "ours", queries, args.topk, args.rounds)
    found |= rates("bm25", engine, queries, args.topk, args.rounds)
    if args.lucene:
        seconds, lucene = lucene_rates(corpus, folder / "lucene", queries, args.topk, args.rounds)
        print(f"build, lucene             {seconds:.1f} s")
        found |= lucene
    for name, value in found.items():
        print(f"{name:<25} {value:,.0f} queries/s   {value / found[f'bare, batches of {_BATCH}']:.2f} x bare batches")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure the BM25 engines.")
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--corpus_path", help="a corpus of your own in place of synthetic passages")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--topk", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lucene", action="store_true", help="measure Lucene too; needs the lucene extra")
    parser.add_argument("--build-baseline", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--folder", help="where the files go for the time of the run (default: the temporary folder)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        measure(args, Path(folder))


if __name__ == "__main__":
    main()
