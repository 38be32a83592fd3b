"""What the retriever benchmarks share: a synthetic corpus, and processes that are bound to one CPU."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from verl.retrieval.corpus import Corpus
from verl.retrieval.dense import index_file, index_info
from verl.retrieval.encoder import load_encoder
from verl.retrieval.file_mark import file_mark
from verl.retrieval.index_file import write_index_file
from verl.retrieval.index_kinds import IndexConfig, lay_out

HERE = Path(__file__).parent
_SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
_WORDS = """
water city river war king film music year state house school church company party island mountain road bridge
world team season game player book song album story village county district family government army battle ship
station train language science art history law court market food plant animal bird fish tree light sound
"""
_START_S = 600.0
_ENCODED = 201


def write_world(path: Path, documents: int, queries: int, rare_words: int, rng: random.Random) -> tuple[str, ...]:
    """Write passages of 40 to 100 words with Zipf-like frequencies; return queries of 8 words taken from them.

    Args:
        rare_words: made-up words besides the common ones; a real corpus has many, an encoder reads each as several
            tokens.
    """
    rare = ["".join(rng.choices(_SYLLABLES, k=rng.randint(2, 4))) for _ in range(rare_words)]
    words = [*_WORDS.split(), *rare]
    cumulative = list(accumulate(1 / (rank + 10) for rank in range(len(words))))
    asked: dict[str, None] = {}
    with path.open("w", encoding="utf-8") as file:
        for number in range(documents):
            passage = rng.choices(words, cum_weights=cumulative, k=rng.randint(40, 100))
            contents = f'"{" ".join(passage[:2])}"\n{" ".join(passage[2:])}'
            file.write(json.dumps({"id": str(number), "contents": contents}) + "\n")
            if len(asked) < queries:
                asked[" ".join(rng.sample(passage, 8))] = None
    while len(asked) < queries:
        asked[" ".join(rng.choices(words, cum_weights=cumulative, k=8))] = None
    return tuple(asked)


def index_random(corpus: Corpus, retriever: str, folder: Path) -> None:
    """Write a flat dense index of random unit vectors, in which searching takes as long as among real ones.

    Some documents, evenly spread, are really encoded: by a few the library knows the encoder of an index.
    """
    encoder, config = load_encoder(retriever), IndexConfig()
    vectors = np.random.default_rng(0).standard_normal((len(corpus), encoder.width), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    real = np.unique(np.linspace(0, len(corpus) - 1, _ENCODED).astype(int))
    vectors[real] = encoder.encode_passages([corpus[row].contents for row in real.tolist()])
    path = folder / index_file(retriever, config.kind)
    folder.mkdir()
    write_index_file(lay_out(config, *vectors.shape), vectors, path)
    info = index_info(corpus, retriever, None, config, encoder.spec)
    replace(info, files={path.name: file_mark(path)}).save(folder)


class Process:
    """A process of Python's, bound to one CPU if one is given.

    Attributes:
        port: where it listens, if it does.
    """

    port = 0

    def __init__(self, arguments: Sequence[str], cpu: int | None, **options: Any) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *map(str, arguments)]
        cpus = {cpu} if cpu is not None else os.sched_getaffinity(0)
        self.popen = subprocess.Popen(
            command, env=environment, preexec_fn=lambda: os.sched_setaffinity(0, cpus), **options
        )

    def cpu_seconds(self) -> float:
        """Return the CPU time it has used."""
        fields = Path(f"/proc/{self.popen.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """End it."""
        self.popen.terminate()
        self.popen.wait()


class Bare(Process):
    """The engine and the library in a process of their own."""

    def __init__(self, retriever: str, folder: Path, corpus: Path, topk: int, cpu: int) -> None:
        arguments = [HERE / "retriever_bare.py", retriever, folder, corpus, topk]
        quiet = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        super().__init__(list(map(str, arguments)), cpu, **quiet)
        if self.popen.stdout.readline() != "ready\n":
            raise SystemExit(f"{retriever}: the engine did not open")

    def ask(self, way: str, queries: Sequence[str], batch: int) -> dict[str, Any]:
        """Search in batches; return `seconds` and `hits`."""
        self.popen.stdin.write(json.dumps({"way": way, "queries": list(queries), "batch": batch}) + "\n")
        self.popen.stdin.flush()
        return json.loads(self.popen.stdout.readline())


@contextmanager
def server(arguments: Sequence[object], port: int, cpu: int | None = None) -> Iterator[Process]:
    """Run a server, whose port is added to the arguments, and wait until it is well."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = Process([*map(str, arguments), "--port", str(port)], cpu, **quiet)
    process.port = port
    try:
        deadline = time.monotonic() + _START_S
        while not _well(port):
            if process.popen.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{arguments[0]} did not start")
            time.sleep(0.2)
        yield process
    finally:
        process.stop()


def _well(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def stop_in_order() -> None:
    """Have SIGTERM end this process through its context managers, which take the others with them."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def ask(job: dict[str, Any], cpu: int | None = None) -> dict[str, Any]:
    """Run a job of `retriever_load.py`, on a CPU of its own if one is given."""
    load = Process([str(HERE / "retriever_load.py")], cpu, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    output, _ = load.popen.communicate(json.dumps(job))
    if load.popen.returncode:
        raise SystemExit("the load generator failed")
    return json.loads(output)
