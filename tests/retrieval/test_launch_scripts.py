"""The launch scripts, really run; and that a query's answer is the same to the byte, however and whomever one asks."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path

import faiss
import numpy as np
import pytest

from tests.retrieval.support import free_port, live, open_corpus, write_tiny_bert
from tests.retrieval.web_server import WebServer
from verl.retrieval import rerank_server
from verl.retrieval.app import create_app
from verl.retrieval.build import build_index
from verl.retrieval.build_options import BuildOptions
from verl.retrieval.corpus import Corpus
from verl.retrieval.encoder import Encoder, load_encoder
from verl.retrieval.encoder_spec import EncoderConfig
from verl.retrieval.engine import Engine, open_index
from verl.retrieval.index_kinds import IndexConfig
from verl.retrieval.opening import EngineOptions, open_engine
from verl.retrieval.server_config import CacheConfig, ServerConfig
from verl.retrieval.server_flags import configs, parser

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "deploy_retriever"
WORDS = ("river", "capital", "planet", "moon", "iron", "king", "sea", "tree")
QUERIES = tuple(f"{first} of the {second}" for first in WORDS for second in WORDS[:4])
TOPK, FUSION_DEPTH, RRF_K = 10, 100, 60  # of the last two, the service's defaults
OWN_VARIABLES = ("OMP_NUM_THREADS", "RETRIEVER_NAME", "INDEX_PATH", "INDEX_PATHS", "CORPUS_PATH", "TOPK", "PORT")
"""Not passed on: a server shall use all CPUs, so that one worker computes with other numbers of threads than four."""
START_S = 600.0
"""Four processes that import torch one after the other, on a machine that may be busy."""
CPU = EncoderConfig(device="cpu")


@dataclass(frozen=True)
class World:
    """Hundreds of passages with some dozens of texts, so that many scores are equal, and indexes of them."""

    corpus: Corpus
    texts: dict[str, str]
    encoder: Encoder
    vectors: np.ndarray
    model: Path
    bm25: Path
    ivf: Path
    published: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder, rng = tmp_path_factory.mktemp("world"), random.Random(0)
    passages = [(f"d{row:03}", rng.choice(WORDS[:2]), " ".join(rng.choices(WORDS, k=2))) for row in range(400)]
    corpus = open_corpus(folder, passages)
    model = write_tiny_bert(folder / "model", width=64)
    encoder = load_encoder("e5", str(model), CPU)
    vectors = encoder.encode_passages([document.contents for document in corpus.documents()])
    vectors.tofile(folder / "vectors")
    options = BuildOptions(str(model), CPU, index=IndexConfig("IVF-SQ8"), embedding_path=folder / "vectors")
    build_index(corpus, "e5", folder / "ivf", options)
    build_index(corpus, "bm25", folder / "bm25")
    flat, published = faiss.IndexFlatIP(vectors.shape[1]), folder / "published" / "e5_Flat.index"
    flat.add(vectors)
    published.parent.mkdir()
    faiss.write_index(flat, str(published))
    texts = {document.id: document.contents for document in corpus.documents()}
    return World(corpus, texts, encoder, vectors, model, folder / "bm25", folder / "ivf", published)


def ask(port: int, method: str, path: str, body: object = None) -> tuple[int, bytes]:
    """Return status and body, over a connection of its own, which any of the workers may get."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()


def post(port: int, **body: object) -> bytes:
    """Return what `/retrieve` answers."""
    status, answer = ask(port, "POST", "/retrieve", body)
    assert status == 200, answer
    return answer


def ready_workers(port: int) -> int:
    """Return how many workers have loaded their index; asked in a cheap way, as they need the CPUs for that."""
    try:
        _, text = ask(port, "GET", "/metrics")
    except OSError:
        return 0
    return sum(int(float(line.split()[-1])) for line in text.splitlines() if line.startswith(b"retriever_ready"))


@contextmanager
def launched(folder: Path, script: str, *flags: object, workers: int = 1, **variables: object) -> Iterator[int]:
    """Run a script as a user does, from another folder; gives the port, and expects a clean end after SIGTERM."""
    port = free_port()
    own = {"PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "PORT": port, **variables}
    kept = {name: value for name, value in os.environ.items() if name not in OWN_VARIABLES}
    command = ["bash", str(SCRIPTS / script), *map(str, flags), "--workers", str(workers)]
    log = folder / f"{script}.log"
    with log.open("wb") as output:
        env = kept | {name: str(value) for name, value in own.items()}
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + START_S
        while ready_workers(port) < workers:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        assert ask(port, "GET", "/ready")[0] == 200
        yield port
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0 and "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Answers:
    """What a service said: to each query alone, and to requests of several queries, some of them at the same time.

    Attributes:
        deep: the ids of more documents.
    """

    alone: dict[str, bytes]
    together: list[tuple[tuple[str, ...], bytes]]
    deep: dict[str, list[str]]

    @classmethod
    def of(cls, port: int) -> Answers:
        """Ask a service."""
        rng = random.Random(0)

        def answered(queries: Sequence[str]) -> tuple[tuple[str, ...], bytes]:
            return tuple(queries), post(port, queries=queries, topk=TOPK, return_scores=True)

        alone = {query: answered([query])[1] for query in QUERIES}
        requests = [rng.sample(QUERIES, size) for size in (2, 3, 7, 16, len(QUERIES))]
        together = list(map(answered, requests))
        with ThreadPoolExecutor(12) as threads:
            together += threads.map(answered, [*([query] for query in QUERIES), *requests])
        found = json.loads(post(port, queries=QUERIES, topk=FUSION_DEPTH))["result"]
        deep = [[hit["id"] for hit in hits] for hits in found]
        return cls(alone, together, dict(zip(QUERIES, deep, strict=True)))

    def hits(self, query: str) -> list[tuple[str, float]]:
        """Return ids and scores."""
        (hits,) = json.loads(self.alone[query])["result"]
        return [(hit["document"]["id"], hit["score"]) for hit in hits]


def asked_here(engine: Engine) -> Answers:
    """Ask a service of one worker, in this process."""
    config = ServerConfig(topk=TOPK, cache=CacheConfig(memory_mb=0))
    with live(create_app(engine, config), config) as port:
        return Answers.of(port)


@pytest.fixture(scope="module")
def bm25(world: World, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What MedCorp's script for BM25 answers."""
    variables = {"INDEX_PATH": world.bm25, "CORPUS_PATH": world.corpus.path}
    script = "retrieval_launch_medcorp_bm25.sh"
    with launched(tmp_path_factory.mktemp("bm25"), script, "--cache_mb", 0, **variables) as port:
        return Answers.of(port)


@pytest.fixture(scope="module")
def dense(world: World, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What four workers answer from a published file; MIRAGE's script runs MedCorp's, and that any dense index's."""
    flags = ("--retriever_model", world.model, "--device", "cpu", "--cache_mb", 0)
    variables = {"INDEX_PATH": world.published, "CORPUS_PATH": world.corpus.path}
    folder = tmp_path_factory.mktemp("dense")
    with launched(folder, "retrieval_launch_mirage.sh", *flags, workers=4, **variables) as port:
        return Answers.of(port)


@pytest.fixture(scope="module")
def hybrid(world: World, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What four workers answer from BM25 and an IVF-SQ8 index."""
    variables = {"INDEX_PATHS": f"{world.bm25} {world.ivf}", "CORPUS_PATH": world.corpus.path}
    flags, folder = ("--device", "cpu", "--cache_mb", 0), tmp_path_factory.mktemp("hybrid")
    with launched(folder, "retrieval_launch_hybrid.sh", *flags, workers=4, **variables) as port:
        return Answers.of(port)


def test_a_published_index_file_is_served_exactly(world: World, dense: Answers) -> None:
    ids = list(world.texts)
    for query in QUERIES:
        scores = (world.vectors @ world.encoder.encode_queries([query])[0]).tolist()
        expected = dict(zip(ids, scores, strict=True))
        hits = dense.hits(query)
        assert [score for _, score in hits] == pytest.approx(sorted(scores, reverse=True)[:TOPK], abs=1e-5)
        assert [score for _, score in hits] == pytest.approx([expected[id] for id, _ in hits], abs=1e-5)


@pytest.mark.parametrize("name", ["bm25", "dense"])
def test_equal_passages_have_equal_scores_and_come_by_their_ids(
    world: World, name: str, request: pytest.FixtureRequest
) -> None:
    ties, answers = 0, request.getfixturevalue(name)
    for query in QUERIES:
        hits = answers.hits(query)
        assert hits == sorted(hits, key=lambda hit: (-hit[1], hit[0]))
        for (first, left), (second, right) in pairwise(hits):
            if world.texts[first] == world.texts[second]:
                ties += 1
                assert left == right
    assert ties > 3 * len(QUERIES)


def check_same(expected: Answers, found: Answers) -> None:
    """Expect every answer that was found to be, to the byte, what is expected of its queries alone."""
    start, end = b'{"result":[', b"]}"
    hits = {query: body.removeprefix(start).removesuffix(end) for query, body in expected.alone.items()}
    assert found.alone == expected.alone and found.deep == expected.deep
    for queries, body in found.together:
        assert body == start + b",".join(hits[query] for query in queries) + end


def test_bm25_answers_the_same_in_every_batch(bm25: Answers) -> None:
    check_same(bm25, bm25)


def test_a_dense_index_answers_the_same_from_one_worker_and_after_a_restart_from_four(
    world: World, dense: Answers
) -> None:
    engine = open_index(world.published, world.corpus, "e5", str(world.model), threads=2, encoder=CPU)
    one = asked_here(engine)
    check_same(one, one)
    check_same(one, dense)


def test_a_hybrid_answers_the_same_from_one_worker_and_after_a_restart_from_four(world: World, hybrid: Answers) -> None:
    indexes = (world.bm25, world.ivf)
    opened = open_engine(EngineOptions("hybrid", indexes, world.corpus.path, threads=2, device="cpu"))
    one = asked_here(opened.engine)
    check_same(one, one)
    check_same(one, hybrid)


def test_a_hybrid_is_the_fusion_of_what_its_indexes_hold(world: World, bm25: Answers, hybrid: Answers) -> None:
    dense = open_index(world.ivf, world.corpus, "e5", threads=1, encoder=CPU).search(QUERIES, FUSION_DEPTH)
    for query, result in zip(QUERIES, dense, strict=True):
        exact: dict[str, Fraction] = {}
        for ids in (bm25.deep[query], [document.id for document in result.documents]):
            for rank, id in enumerate(ids, start=1):
                exact[id] = exact.get(id, Fraction(0)) + Fraction(1 / (RRF_K + rank))
        fused = sorted(((id, float(score)) for id, score in exact.items()), key=lambda hit: (-hit[1], hit[0]))
        assert hybrid.hits(query) == fused[:TOPK]
        assert hybrid.deep[query] == [id for id, _ in fused[:FUSION_DEPTH]]


def test_the_web_is_searched_and_the_run_is_repeated_offline_without_a_key(tmp_path: Path) -> None:
    request = {"queries": ["whale", "nothing"], "topk": 5, "return_scores": True}
    script, kept = "retrieval_launch_web.sh", {"WEB_CACHE": tmp_path / "answers.sqlite", "SERPER_API_KEY": ""}
    with WebServer() as web:
        keys = {**kept, "SERPER_API_KEY": web.key}
        with launched(tmp_path, script, "--web_base_url", web.url, **keys) as port:
            recorded = post(port, **request)
        assert [asked.path for asked in web.asked] == ["/search"] * 2
    with launched(tmp_path, script, "--web_cache_mode", "replay", **kept) as port:
        assert post(port, **request) == recorded
    found, nothing = json.loads(recorded)["result"]
    assert nothing == [] and len(found) == 5
    assert "https://example.org/whale/0" in [hit["document"]["id"] for hit in found]


PUBLISHED = [
    ("retrieval_launch.sh", 3000, "e5"),
    ("retrieval_launch_bm25.sh", 4000, "bm25"),
    ("retrieval_launch_medcorp.sh", 3000, "e5"),
    ("retrieval_launch_medcorp_bm25.sh", 4000, "bm25"),
    ("retrieval_launch_mirage.sh", 3000, "e5"),
    ("retrieval_launch_hybrid.sh", 3000, "hybrid"),
    ("retrieval_launch_web.sh", 5000, "serper"),
]


def python_arguments(tmp_path: Path, script: str, **variables: str) -> list[str]:
    """Return what a script hands to Python."""
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in OWN_VARIABLES}
    environment = {**kept, "PYTHON": str(python), **variables}
    command = ["bash", str(SCRIPTS / script), "--host", "::1"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.splitlines()


@pytest.mark.parametrize(("script", "port", "retriever"), PUBLISHED)
def test_a_script_has_the_published_port(script: str, port: int, retriever: str, tmp_path: Path) -> None:
    is_medcorp = "medcorp" in script or "mirage" in script
    given = {} if is_medcorp else {"INDEX_PATH": "a", "INDEX_PATHS": "a b", "CORPUS_PATH": "c"}
    flag, module, *arguments = python_arguments(tmp_path, script, **given)
    server, engine = configs(parser().parse_args(arguments))
    assert (flag, module, server.port, server.host) == ("-m", "verl.retrieval.server", port, "::1")
    assert engine.retriever_name == retriever
    if is_medcorp:
        assert engine.index_path == (Path(f"indexes/medcorp_{retriever}"),)
        assert engine.corpus_path == Path("data/medcorp.jsonl")


def test_the_rerank_script_has_the_published_port(tmp_path: Path) -> None:
    expected = ["-m", "verl.retrieval.rerank_server", "--port", str(rerank_server.PORT), "--host", "::1"]
    assert python_arguments(tmp_path, "rerank_launch.sh") == expected and rerank_server.PORT == 6980


def test_every_script_is_here() -> None:
    assert {path.name for path in SCRIPTS.iterdir()} == {script for script, _, _ in PUBLISHED} | {"rerank_launch.sh"}
