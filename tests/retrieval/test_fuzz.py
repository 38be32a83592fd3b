"""Anything at all sent to the service: it answers with what its schema says, goes on, and answers others meanwhile."""

from __future__ import annotations

import http.client
import json
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.retrieval.support import FakeEngine, live, open_corpus
from verl.retrieval.app import create_app
from verl.retrieval.build import build_index
from verl.retrieval.build_options import BuildOptions
from verl.retrieval.encoder_spec import EncoderConfig
from verl.retrieval.engine import open_index
from verl.retrieval.rerank import Pair
from verl.retrieval.server_config import CacheConfig, ServerConfig
from verl.retrieval.wire import RequestLimits

LIMITS = RequestLimits(max_body_bytes=50_000, max_queries=8, max_query_chars=64)
CONFIG = ServerConfig(
    topk=2, limits=LIMITS, header_timeout_s=1.0, body_timeout_s=1.0, write_timeout_s=1.0, cache=CacheConfig(memory_mb=0)
)
GOOD = json.dumps({"queries": ["good"], "topk": 1}).encode()
PATHS = {"/retrieve", "/api/search", "/health", "/ready", "/info", "/metrics"}
TOKEN = "s3cret"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


class LongestFirst:
    """A reranker that prefers long documents."""

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        return [float(len(document.text)) for _, document in pairs]


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    engine = FakeEngine(open_corpus(tmp_path_factory.mktemp("corpus")))
    app = create_app(engine, CONFIG)
    app.serve_reranker(LongestFirst())
    with live(app, CONFIG) as number:
        yield number


@pytest.fixture(scope="module", params=["bm25", "e5"])
def secured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Iterator[int]:
    """The port of a service over a real index that asks for a token."""
    folder, cpu = tmp_path_factory.mktemp("secured"), EncoderConfig(device="cpu")
    corpus, is_dense = open_corpus(folder), request.param == "e5"
    options = BuildOptions(model=str(tiny_bert), encoder=cpu) if is_dense else None
    build_index(corpus, request.param, folder / "index", options)
    engine = open_index(folder / "index", corpus, request.param, threads=1, encoder=cpu if is_dense else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUZZED_TOKEN", TOKEN)
        app = create_app(engine, replace(CONFIG, token_env="FUZZED_TOKEN"))
    with live(app, CONFIG) as number:
        yield number


def for_every_case(
    port: int, examples: int, paths: set[str], check: Callable[[schemathesis.Case], None], headers: dict[str, str]
) -> None:
    """Check every operation of the service's own schema with data that fits it and with data that does not."""
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json", headers=headers)
    schema.config.checks.negative_data_rejection.expected_statuses = ["400", "401", "413", "422"]
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.path for operation in operations} == paths
    for operation in operations:
        modes = list(GenerationMode) if operation.method == "post" else [GenerationMode.POSITIVE]
        for mode in modes:
            cases = operation.as_strategy(generation_mode=mode)
            settings(
                max_examples=examples if operation.method == "post" else min(examples, 20),
                deadline=None,
                suppress_health_check=list(HealthCheck),
                database=None,
            )(given(case=cases)(check))()


def fuzz(port: int, examples: int, paths: set[str], headers: dict[str, str] | None = None) -> None:
    """Expect of every answer what the schema says; a 5xx is never right."""

    def check(case: schemathesis.Case) -> None:
        # That a request has documents for each of its queries, its schema cannot say.
        excluded = [positive_data_acceptance] * (case.path == "/rerank")
        case.call_and_validate(headers=headers, excluded_checks=excluded)

    for_every_case(port, examples, paths, check, headers or {})


def test_the_service_keeps_to_its_schema(port: int) -> None:
    fuzz(port, 40, PATHS | {"/rerank"})


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_service_keeps_to_its_schema_at_length(port: int) -> None:
    fuzz(port, 1500, PATHS | {"/rerank"})


def test_a_real_engine_behind_a_token_keeps_to_its_schema(secured: int) -> None:
    fuzz(secured, 20, PATHS, BEARER)
    good = {"queries": ["river in France"], "topk": 2}
    answer = httpx.post(f"http://127.0.0.1:{secured}/retrieve", json=good, headers=BEARER)
    assert len(answer.json()["result"][0]) == 2


def test_nothing_but_the_probes_answers_without_the_token(secured: int) -> None:
    before = searched(secured)

    def check(case: schemathesis.Case) -> None:
        answer = case.call()
        if case.path in ("/health", "/ready"):
            assert answer.status_code == 200
        else:
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "unauthorised"

    for_every_case(secured, 10, PATHS, check, BEARER)
    assert searched(secured) == before
    assert httpx.post(f"http://127.0.0.1:{secured}/retrieve", content=GOOD, headers=BEARER).status_code == 200
    assert searched(secured) == before + 1


def searched(port: int) -> float:
    """Return how many queries a service has searched for."""
    lines = httpx.get(f"http://127.0.0.1:{port}/metrics", headers=BEARER).text.splitlines()
    (count,) = [line.split()[1] for line in lines if line.startswith("retriever_searched_queries_total")]
    return float(count)


def body_of(rng: random.Random) -> bytes:
    """Return a body that is wrong in one of many ways, or right."""
    request: dict[str, Any] = {"queries": ["a", "b"], "topk": 2, "return_scores": True}
    text = json.dumps(request).encode()
    nothing: list[Any] = [None, True, -1, 0, 1.5, 1e308, 10**30, "", "x", [], {}, [[]], [None], {"a": 1}]
    kind = rng.randrange(10)
    if kind == 0:
        return rng.randbytes(rng.randrange(400))
    if kind == 1:
        return text[: rng.randrange(len(text))]
    if kind == 2:  # one byte is another
        changed = bytearray(text)
        changed[rng.randrange(len(text))] = rng.randrange(256)
        return bytes(changed)
    if kind == 3:
        depth = rng.choice((10, 500, 1500, 20_000))
        opening, closing = rng.choice(((b"[", b"]"), (b'{"queries":', b"}")))
        return (opening * depth + b"1" + closing * depth)[: LIMITS.max_body_bytes + 10]
    if kind == 4:
        return text.replace(b"2", rng.choice((b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"0x2", b"02", b"2.")))
    if kind == 5:
        return rng.choice((text.decode().encode("utf-16"), b"\xef\xbb\xbf" + text, text.replace(b"a", b"\xc3\x28")))
    if kind == 6:
        return b'{"queries": ["' + b"q" * rng.choice((65, 49_000, 50_001, 60_000)) + b'"]}'
    if kind == 7:
        return json.dumps({"queries": ["q"] * rng.choice((9, 10_000))}).encode()
    if kind == 8:
        return json.dumps(
            {**request, rng.choice(("queries", "topk", "return_scores", "x")): rng.choice(nothing)}
        ).encode()
    return json.dumps({"queries": [rng.choice(("ü", "日本", "\ud800", "\0", " ", "'; --", "${x}", "\\"))]}).encode()


def post_all(port: int, bodies: list[bytes]) -> dict[int, int]:
    """Send bodies over one connection after another; return how often each status came."""
    statuses: dict[int, int] = {}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    for body in bodies:
        try:
            connection.request("POST", "/retrieve", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
        except (BrokenPipeError, ConnectionResetError):  # closed while the body was still being sent
            connection.close()
            statuses[413] = statuses.get(413, 0) + 1
            continue
        content = json.loads(answer.read())
        assert ("result" in content) if answer.status == 200 else content["error"]["message"]
        statuses[answer.status] = statuses.get(answer.status, 0) + 1
    connection.close()
    return statuses


def test_ten_thousand_wrong_bodies(port: int) -> None:
    rng = random.Random(0)
    bodies = [body_of(rng) for _ in range(10_000)]
    with ThreadPoolExecutor(4) as threads:
        counts = list(threads.map(lambda part: post_all(port, bodies[part::4]), range(4)))
    statuses = {status for count in counts for status in count}
    assert sum(sum(count.values()) for count in counts) == 10_000
    assert statuses == {200, 400, 413, 422}
    assert httpx.post(f"http://127.0.0.1:{port}/retrieve", content=GOOD).status_code == 200
