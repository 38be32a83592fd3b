"""The engine without a service: calls it in this process, as `scripts/bench/retriever.py` asks on stdin.

    python scripts/bench/retriever_bare.py RETRIEVER INDEX_FOLDER CORPUS TOPK < questions

Every line of the input is `{"way", "queries", "batch"}` and gets one line of output, `{"seconds", "hits"}`. The ways
are `engine` (ours, documents included) and `library` (encoder and FAISS, or bm25s, down to row numbers).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from verl.retrieval.corpus import Corpus
from verl.retrieval.engine import open_index

Search = Callable[[Sequence[str]], object]


def library(retriever: str, folder: Path, topk: int) -> Search:
    """Return the bare library call over the files of an index."""
    if retriever == "bm25":
        search = bm25s_search(folder)
        return lambda queries: search(queries, topk)
    return _faiss(retriever, folder, topk)


def bm25s_search(folder: Path) -> Callable[[Sequence[str], int], Any]:
    """Return bm25s's own search: rows and scores, (queries, topk) each."""
    import bm25s

    from verl.retrieval.bm25_analysis import Analyzer
    from verl.retrieval.settings import BM25Config

    index = bm25s.BM25.load(str(folder / "bm25"), mmap=True)
    analyzer = Analyzer(BM25Config())

    def search(queries: Sequence[str], topk: int) -> Any:
        return index.retrieve([analyzer(query) for query in queries], k=topk, show_progress=False, n_threads=0)

    return search


def _faiss(retriever: str, folder: Path, topk: int) -> Search:
    import faiss

    from verl.retrieval.encoder import load_encoder

    (path,) = folder.glob("*.index")
    index, encoder = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC), load_encoder(retriever)
    return lambda queries: index.search(encoder.encode_queries(queries), topk)


def main(retriever: str, folder: str, corpus: str, topk: str) -> None:
    """Answer the questions on stdin."""
    engine = open_index(folder, Corpus.open(corpus), retriever, threads=1)
    ways: dict[str, Search] = {
        "engine": lambda queries: engine.search(queries, int(topk)),
        "library": library(retriever, Path(folder), int(topk)),
    }
    for search in ways.values():
        search(["a first query"])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        search, queries, batch = ways[asked["way"]], asked["queries"], asked["batch"]
        start = time.perf_counter()
        found = [search(queries[at : at + batch]) for at in range(0, len(queries), batch)]
        seconds = time.perf_counter() - start
        hits = []
        if asked["way"] == "engine":
            results = [result for part in found for result in part]
            hits = [[[doc.id for doc in result.documents], list(result.scores)] for result in results]
        json.dump({"seconds": seconds, "hits": hits}, sys.stdout)
        sys.stdout.write("\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
