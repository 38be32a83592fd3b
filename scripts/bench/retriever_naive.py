"""The server to beat: it encodes and searches one request at a time, behind a lock.

python scripts/bench/retriever_naive.py RETRIEVER INDEX_FOLDER CORPUS --port PORT
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from verl.retrieval.corpus import Corpus
from verl.retrieval.engine import open_index


class Request(BaseModel):
    """The published request."""

    queries: list[str]
    topk: int = 3
    return_scores: bool = False


def main(retriever: str, folder: str, corpus: str, _: str, port: str) -> None:
    """Serve until the process is ended."""
    engine = open_index(folder, Corpus.open(corpus), retriever, threads=1)
    app, lock = FastAPI(), threading.Lock()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/retrieve")
    def retrieve(request: Request) -> dict[str, Any]:
        rows = []
        for query in request.queries:
            with lock:
                (result,) = engine.search([query], request.topk)
            documents = [
                {"id": doc.id, "contents": doc.contents, "title": doc.title, "text": doc.text}
                for doc in result.documents
            ]
            pairs = zip(documents, result.scores, strict=True)
            rows.append([{"document": document, "score": score} for document, score in pairs])
        return {"result": rows}

    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="error")


if __name__ == "__main__":
    main(*sys.argv[1:])
