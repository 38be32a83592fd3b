"""Measure a dense index against flat search on synthetic vectors: recall, queries/s, memory of a serving process.

    python scripts/bench/dense.py                                        # 50,000 vectors, a minute
    python scripts/bench/dense.py --vectors 1000000 --folder /data/bench # a million; 2 GB of disk, half an hour

Two distributions of unit vectors. `clustered`: one cluster per 4,096 vectors, as wide as its centre is far from the
origin, in which the n-th direction has a standard deviation in proportion to n^-0.5, as the spectra of embeddings
fall; clusters are larger than the lists of the index, so several must be searched. `random`: uniform directions, in
which lists find no structure, so that most of the index must be searched. Queries are vectors of the index with noise
of the same kind (cosine 0.8), as a question lies near its passage.

The index is built and tuned by the library, then opened by a fresh process that also loads a text encoder, and answers
every query alone and in batches; its results must be equal. Flat search and bare FAISS run in this process. All rates
are printed as ratios to bare FAISS flat search in batches. Pin the CPUs (`taskset`) for figures that compare.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import faiss
import numpy as np
import torch

from verl.retrieval.dense import open_source
from verl.retrieval.dense_search import Hits, Source, nearest
from verl.retrieval.encoder import load_encoder
from verl.retrieval.exact import ExactSearch
from verl.retrieval.index_file import read_index_file, write_index_file
from verl.retrieval.index_kinds import lay_out, parse_kind
from verl.retrieval.tune import Sweep, TuneConfig, sweep, table

_CHUNK = 20_000
_CLUSTER = 4096
_BATCH = 64
_TOPK = 10
_FLAT_QUERIES = 128


@dataclass(frozen=True, slots=True)
class Served:
    """What a fresh process reports; memory in bytes.

    Attributes:
        peak: largest resident memory, of the process with encoder and index.
        before: resident memory before the index was opened.
    """

    open_s: float
    before: int
    peak: int
    alone_per_s: float
    batched_per_s: float
    differing: int


def main() -> None:
    """Run both distributions, or serve an index for the measuring process."""
    args = _parser().parse_args()
    logging.getLogger("verl").setLevel(logging.ERROR)
    logging.getLogger("faiss").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    if args.serve:
        sys.stdout.write(json.dumps(asdict(serve(Path(args.serve), args.value))) + "\n")
        return
    for distribution in args.distributions:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            measure(Path(folder), distribution, args)


def measure(folder: Path, distribution: str, args: argparse.Namespace) -> None:
    """Build, tune, serve and compare one distribution."""
    vectors = write_vectors(folder / "vectors.f32", distribution, args.vectors, args.width, args.seed)
    queries = near(vectors, distribution, args.queries, args.seed + 1)
    np.save(folder / "queries.npy", queries)
    layout = lay_out(parse_kind(args.index_kind), args.vectors, args.width)
    _say(
        f"\n{distribution}: {args.vectors:,} vectors of {args.width} numbers, {layout.factory}, {args.threads} threads"
    )
    start = time.perf_counter()
    write_index_file(layout, vectors, folder / "bench.index")
    _say(f"built in {time.perf_counter() - start:.0f} s")
    index = read_index_file(folder / "bench.index")
    found = sweep(index, queries, vectors, TuneConfig(args.target_recall, _TOPK))
    _say(table(found, _TOPK))
    if found.chosen is None:
        _say(f"recall@{_TOPK} {args.target_recall} is not reached")
        return
    served = _serve(folder, found.chosen.value, args.threads)
    codes = args.vectors * args.width
    _say(f"opened in {served.open_s:.3f} s; peak memory {served.peak / 2**30:.2f} GiB, {served.before / 2**30:.2f} GiB "
         f"of it before the index was opened; beyond the SQ8 size of the vectors ({codes / 2**30:.2f} GiB): "
         f"{(served.peak - codes) / 2**30:.2f} GiB")  # fmt: skip
    _say(f"{served.differing} of {args.queries} results differ between a query alone and in a batch")
    _say(_rates(index, vectors, queries, found, served))


def _rates(index: faiss.Index, vectors: np.ndarray, queries: np.ndarray, found: Sweep, served: Served) -> str:
    """Measure flat search and bare FAISS here, and lay all rates out as ratios."""
    assert found.chosen is not None
    source = open_source(index, {found.parameter: found.chosen.value} if found.parameter else {})
    few = queries[:_FLAT_QUERIES]
    exact = ExactSearch(vectors)
    inner = faiss.METRIC_INNER_PRODUCT
    rows = {
        "flat, FAISS, batches": _rate(few, _BATCH, lambda batch: faiss.knn(batch, vectors, _TOPK, metric=inner)),
        "flat, FAISS, one by one": _rate(few[:16], 1, lambda query: faiss.knn(query, vectors, _TOPK, metric=inner)),
        "flat, ours, batches": _rate(few, _BATCH, lambda batch: exact.search(batch, _TOPK)),
        "flat, ours, one by one": _rate(few[:16], 1, lambda query: exact.search(query, _TOPK)),
        "index, FAISS, batches": _rate(queries, _BATCH, lambda batch: index.search(batch, _TOPK)),
        "index, FAISS, one by one": _rate(queries, 1, lambda query: index.search(query, _TOPK)),
        "index, ours, batches": _rate(queries, _BATCH, lambda batch: nearest(source, batch, _TOPK)),
        "index, ours, one by one": _rate(queries, 1, lambda query: nearest(source, query, _TOPK)),
        "fresh process, batches": served.batched_per_s,
        "fresh process, one by one": served.alone_per_s,
    }
    exact.close()
    source.close()
    base = rows["flat, FAISS, batches"]
    lines = [f"{'':<28}{'queries/s':>10}{'x flat':>9}"]
    lines += [f"{name:<28}{rate:>10.1f}{rate / base:>9.2f}" for name, rate in rows.items()]
    return "\n".join(lines)


def _rate(queries: np.ndarray, step: int, work: Callable[[np.ndarray], object]) -> float:
    start = time.perf_counter()
    for batch in _batches(queries, step):
        work(batch)
    return len(queries) / (time.perf_counter() - start)


def _batches(queries: np.ndarray, step: int) -> Iterator[np.ndarray]:
    for start in range(0, len(queries), step):
        yield queries[start : start + step]


def write_vectors(path: Path, distribution: str, rows: int, width: int, seed: int) -> np.ndarray:
    """Write unit vectors in bounded memory; returns them mapped, (rows, width) float32."""
    rng = np.random.default_rng(seed)
    centres = noise(rng, distribution, max(1, rows // _CLUSTER), width)
    with path.open("wb") as file:
        for start in range(0, rows, _CHUNK):
            made = noise(rng, distribution, min(_CHUNK, rows - start), width)
            if distribution == "clustered":
                made = _unit(centres[rng.integers(0, len(centres), len(made))] + made)
            file.write(memoryview(made).cast("B"))
    return np.memmap(path, dtype=np.float32, mode="r", shape=(rows, width))


def noise(rng: np.random.Generator, distribution: str, rows: int, width: int) -> np.ndarray:
    """Return random unit vectors, (rows, width) float32."""
    made = rng.standard_normal((rows, width), dtype=np.float32)
    if distribution == "clustered":
        made *= np.arange(1, width + 1, dtype=np.float32) ** np.float32(-0.5)
    return _unit(made)


def near(vectors: np.ndarray, distribution: str, count: int, seed: int) -> np.ndarray:
    """Return unit vectors with a cosine of about 0.8 to vectors of the index, (count, D) float32."""
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(len(vectors), count, replace=False, shuffle=False))
    return _unit(np.asarray(vectors[rows]) + np.float32(0.75) * noise(rng, distribution, count, vectors.shape[1]))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def serve(folder: Path, value: int) -> Served:
    """Open the index in this process, beside an encoder, and answer all queries."""
    load_encoder("minilm").encode_queries(["how much memory does a service take"])
    queries = np.load(folder / "queries.npy")
    before = _memory("VmRSS")
    start = time.perf_counter()
    index = read_index_file(folder / "bench.index")
    name = "nprobe" if isinstance(index, faiss.IndexIVF) else "ef_search"
    source = open_source(index, {name: value} if value else {})
    opened = time.perf_counter() - start
    start = time.perf_counter()
    alone = [_best(hits) for query in _batches(queries, 1) for hits in nearest(source, query, _TOPK)]
    alone_s = time.perf_counter() - start
    batched, batched_s = _search(source, queries)
    differing = sum(one != other for one, other in zip(alone, batched, strict=True))
    count = len(queries)
    return Served(opened, before, _memory("VmHWM"), count / alone_s, count / batched_s, differing)


def _search(source: Source, queries: np.ndarray) -> tuple[list[list[tuple[float, int]]], float]:
    start = time.perf_counter()
    found = [hits for batch in _batches(queries, _BATCH) for hits in nearest(source, batch, _TOPK)]
    return [_best(hits) for hits in found], time.perf_counter() - start


def _best(hits: Hits) -> list[tuple[float, int]]:
    return sorted(zip((-hits.scores).tolist(), hits.rows.tolist(), strict=True))[:_TOPK]


def _memory(name: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {name} in /proc/self/status")


def _serve(folder: Path, value: int, threads: int) -> Served:
    command = [sys.executable, __file__, "--serve", str(folder), "--value", str(value), "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True)
    return Served(**json.loads(done.stdout.splitlines()[-1]))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Benchmark a dense index against flat search.")
    parser.add_argument("--vectors", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--index_kind", default="IVF-SQ8")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--target_recall", type=float, default=0.95)
    parser.add_argument("--distributions", nargs="+", choices=("clustered", "random"), default=["clustered", "random"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", help="where vectors and index are written (default: the system's temporary folder)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--value", type=int, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
