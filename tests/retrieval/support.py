"""Small corpora, a tiny BERT and fake engines for the retrieval tests."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from transformers import BertConfig, BertModel, BertTokenizerFast

from verl.retrieval.corpus import Corpus
from verl.retrieval.engine import EngineInfo
from verl.retrieval.protocol import ConnectionGuard
from verl.retrieval.server_config import ServerConfig
from verl.types import SearchResult

PASSAGES = (
    ("d0", "Paris", "Paris is the capital of France, on the river Seine."),
    ("d1", "Berlin", "Berlin is the capital of Germany and its largest city."),
    ("d2", "Seine", "The Seine is a river in northern France."),
    ("d3", "Mercury (planet)", 'Mercury, the "swift" planet, is closest to the Sun.'),
    ("d4", "Mercury (element)", "Mercury is a metal that is liquid at room temperature."),
    ("d5", "Twin", "A twin passage about lighthouses."),
    ("d6", "Twin", "A twin passage about lighthouses."),
    ("d7", "Twin", "A twin passage about lighthouses."),
)


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def write_corpus(path: Path, passages: Sequence[tuple[str, str, str]] = PASSAGES) -> Path:
    return write_jsonl(path, [{"id": id, "contents": f'"{title}"\n{text}'} for id, title, text in passages])


def open_corpus(folder: Path, passages: Sequence[tuple[str, str, str]] = PASSAGES) -> Corpus:
    return Corpus.open(write_corpus(folder / "corpus.jsonl", passages))


def write_tiny_bert(folder: Path, width: int = 32, seed: int = 0) -> Path:
    """Save a BERT with random weights and a tokenizer of characters and a few words."""
    folder.mkdir(parents=True)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:()\"'"
    words = ["query", "passage", "the", "is", "of", "river", "capital", "planet"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), "utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@dataclass
class FakeEngine:
    """Returns the first `topk` documents for every query, with the length of the query as the score."""

    corpus: Corpus
    name: str = "fake"
    calls: list[tuple[list[str], int]] = field(default_factory=list)
    gate: threading.Event | None = None
    started: threading.Event = field(default_factory=threading.Event)

    @property
    def info(self) -> EngineInfo:
        corpus = self.corpus.fingerprint
        return EngineInfo(self.name, len(self.corpus), len(self.corpus), corpus, f"{self.name}-{corpus}")

    def close(self) -> None:
        pass

    def search(self, queries: Sequence[str], topk: int) -> list[SearchResult]:
        self.calls.append((list(queries), topk))
        self.started.set()
        if self.gate is not None:
            self.gate.wait(timeout=20)
        documents = tuple(self.corpus.documents(0, topk))
        return [SearchResult(query, documents, (float(len(query)),) * topk) for query in queries]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def live(app: FastAPI, config: ServerConfig) -> Iterator[int]:
    """Serve an app on a free port from a thread, as `verl.retrieval.server` does; gives the port."""
    settings = uvicorn.Config(
        app,
        http=ConnectionGuard(config).protocol(),
        ws="none",
        loop="uvloop",
        log_config=None,
        timeout_keep_alive=config.keep_alive_s,
        timeout_graceful_shutdown=10,
    )
    server = uvicorn.Server(settings)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
