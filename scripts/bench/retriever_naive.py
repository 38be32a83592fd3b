"""The server to beat: it encodes and searches one request at a time, behind a lock.

    python scripts/bench/retriever_naive.py WAY RETRIEVER INDEX_FOLDER CORPUS --port PORT

WAY says with what: `library` is what one writes in an afternoon, sentence-transformers and FAISS, or bm25s, over the
files of the index; `engine` is ours, so that only the service is compared.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from retriever_bare import bm25s_search

from verl.retrieval.corpus import Corpus
from verl.retrieval.engine import open_index
from verl.types import Document

Search = Callable[[str, int], tuple[list[Document], list[float]]]


class Request(BaseModel):
    """The published request."""

    queries: list[str]
    topk: int = 3
    return_scores: bool = False


def engine(retriever: str, folder: str, corpus: Corpus) -> Search:
    """Return the search of our engine, for one query."""
    opened = open_index(folder, corpus, retriever, threads=1)

    def search(query: str, topk: int) -> tuple[list[Document], list[float]]:
        (result,) = opened.search([query], topk)
        return list(result.documents), list(result.scores)

    return search


def library(retriever: str, folder: str, corpus: Corpus) -> Search:
    """Return the search of the libraries, for one query."""
    search_batch = bm25s_search(Path(folder)) if retriever == "bm25" else _sentence_transformers(retriever, folder)

    def search(query: str, topk: int) -> tuple[list[Document], list[float]]:
        rows, scores = search_batch([query], topk)
        return corpus.rows(rows[0]), scores[0].tolist()

    return search


def _sentence_transformers(retriever: str, folder: str) -> Callable[..., Any]:
    import faiss
    from sentence_transformers import SentenceTransformer

    from verl.retrieval.encoder import default_model
    from verl.retrieval.encoder_spec import ENCODERS

    (path,) = Path(folder).glob("*.index")
    index, spec = faiss.read_index(str(path)), ENCODERS[retriever]
    model = SentenceTransformer(default_model(spec), device="cpu")

    def search(queries: list[str], topk: int) -> Any:
        texts = [spec.query_prefix + query for query in queries]
        vectors = model.encode(texts, normalize_embeddings=spec.normalize, show_progress_bar=False)
        return index.search(vectors, topk)[::-1]

    return search


def main(way: str, retriever: str, folder: str, corpus_path: str, _: str, port: str) -> None:
    """Serve until the process is ended."""
    search = {"engine": engine, "library": library}[way](retriever, folder, Corpus.open(corpus_path))
    app, lock = FastAPI(), threading.Lock()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/retrieve")
    def retrieve(request: Request) -> dict[str, Any]:
        rows = []
        for query in request.queries:
            with lock:
                documents, scores = search(query, request.topk)
            fields = [
                {"id": doc.id, "contents": doc.contents, "title": doc.title, "text": doc.text} for doc in documents
            ]
            rows.append([{"document": doc, "score": score} for doc, score in zip(fields, scores, strict=True)])
        return {"result": rows}

    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="error")


if __name__ == "__main__":
    main(*sys.argv[1:])
