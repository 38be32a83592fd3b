"""One reply for equal requests: from the cache in each of its modes, and from a request that is under way."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from generator_llms.cache import ReplyCache
from generator_llms.client import Answered, GeneratorClient
from generator_llms.config import GeneratorConfig
from generator_llms.judge import LLMJudge
from generator_llms.replies import Completion, Sample
from generator_llms.store import ReplyStore
from generator_llms.usage import GeneratorStats
from tests.generator_llms.backends import client_of
from tests.generator_llms.fake_server import FakeServer, Reply, as_json, chat
from verl.errors import ConfigError, GeneratorError
from verl.types import Document, Question

QUESTION = Question("q/1", "Where is the Louvre?", ("Paris",), "toy")
DOCUMENTS = tuple(Document(str(i), f"Title {i}", "word " * 30) for i in range(4))
HELLO = [{"role": "user", "content": "hello"}]


def numbered(server_requests: list[int]) -> Any:
    """Return a responder that says how many requests there were, so that no two replies are equal."""

    def respond(request: dict[str, Any]) -> Reply:
        server_requests.append(1)
        said = f"reply {len(server_requests)}"
        if not request.get("logprobs"):
            return chat(said)
        choice = {"message": {"content": said}, "logprobs": {"content": [{"logprob": -0.1 * len(server_requests)}]}}
        return as_json({"model": "tiny", "choices": [choice]})

    return respond


async def test_equal_requests_at_once_are_one_request() -> None:
    slow = Reply(chat("Paris").body, delay=0.05)
    async with FakeServer(default=lambda r: slow) as server, client_of("openai", server) as client:
        replies = await asyncio.gather(*(client.complete(HELLO) for _ in range(5)))
        await client.complete(HELLO)  # later: nothing is kept without a cache
    assert [reply.text for reply in replies] == ["Paris"] * 5
    assert len(server.requests) == 2 and client.stats.shared == 4


async def test_a_failure_is_shared_too_and_counted_for_everyone() -> None:
    wrong = Reply(b"{}", status=400, delay=0.05)
    async with FakeServer(default=lambda r: wrong) as server, client_of("openai", server) as client:
        outcomes = await asyncio.gather(*(client.complete(HELLO) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(outcome, GeneratorError) for outcome in outcomes)
    assert len(server.requests) == 1 and client.stats.failures == 3


async def test_one_of_several_callers_giving_up_does_not_end_it_for_the_others() -> None:
    slow = Reply(chat("Paris").body, delay=0.1)
    async with FakeServer(default=lambda r: slow) as server, client_of("openai", server) as client:
        first, second = (asyncio.create_task(client.complete(HELLO)) for _ in range(2))
        await asyncio.sleep(0.02)
        first.cancel()
        assert (await second).text == "Paris"
    assert len(server.requests) == 1


async def test_when_all_callers_give_up_the_request_ends_and_the_next_one_starts_anew() -> None:
    async with FakeServer(Reply(hang=True)) as server, client_of("openai", server, concurrency=1) as client:
        callers = [asyncio.create_task(client.complete(HELLO)) for _ in range(2)]
        while not server.requests:
            await asyncio.sleep(0.005)
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        assert (await client.complete(HELLO)).text == "Paris"  # its slot is free again
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"temperature": 0.7, "seed": None}, 3), ({"temperature": 0.7, "seed": 1}, 1), ({"seed": None}, 1)],
)
async def test_sampled_requests_without_a_seed_stay_apart(settings: dict[str, Any], expected: int) -> None:
    slow = Reply(chat("Paris").body, delay=0.05)
    async with FakeServer(default=lambda r: slow) as server, client_of("openai", server, **settings) as client:
        await asyncio.gather(*(client.complete(HELLO) for _ in range(3)))
    assert len(server.requests) == expected


async def test_another_draw_asks_the_same_once_more(tmp_path: Path) -> None:
    async with (
        FakeServer(default=numbered([])) as server,
        client_of("openai", server, cache_path=tmp_path / "c.sqlite") as client,
    ):
        draws = [await client.answer(QUESTION, DOCUMENTS, draw=draw) for draw in (0, 1, 2, 1)]
    assert [answered.answer for answered in draws] == ["reply 1", "reply 2", "reply 3", "reply 2"]
    assert server.requests[0] == server.requests[1] == server.requests[2]


async def test_closing_the_client_ends_what_is_under_way() -> None:
    async with FakeServer(Reply(hang=True)) as server:
        async with client_of("openai", server) as client:
            pending = asyncio.create_task(client.complete(HELLO))
            while not server.requests:
                await asyncio.sleep(0.005)
        with pytest.raises(asyncio.CancelledError):
            await pending


async def test_what_was_cached_needs_no_server(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    async with FakeServer() as server, client_of("openai", server, cache_path=path) as client:
        first = await client.answer(QUESTION, DOCUMENTS)
        second = await client.answer(QUESTION, DOCUMENTS)
    assert first == second and len(server.requests) == 1
    async with client_of("openai", server, cache_path=path, retry_window_s=0.0) as client:
        assert await client.answer(QUESTION, DOCUMENTS) == first
        assert client.stats.cached == 1


CHANGES: list[dict[str, Any]] = [
    {"temperature": 0.5},
    {"top_p": 0.5},
    {"seed": 1},
    {"seed": None},
    {"max_tokens": 9},
    {"model": "small"},
    {"model_identity": "b"},
    {"extra_body": {"top_k": 1}},
    {"style": "completion"},
    {"backend": "anthropic"},
    {"backend": "azure"},
    {"backend": "azure", "api_version": "2025-01-01", "base_urls": ("https://other.openai.azure.com",)},
]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: " ".join(changes))
async def test_a_reply_to_other_parameters_never_answers(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "replies.sqlite"
    async with (
        FakeServer(models=[{"id": "tiny"}, {"id": "small"}]) as server,
        client_of("openai", server, cache_path=path) as client,
    ):
        await client.complete(HELLO)
    backend = changes.get("backend", "openai")
    changes = {key: value for key, value in changes.items() if key != "backend"}
    async with client_of(backend, server, cache_path=path, cache_mode="replay", **changes) as client:
        with pytest.raises(GeneratorError, match="cache_mode=replay"):
            await client.complete(HELLO)
        assert client.stats.cached == 0


@pytest.mark.parametrize(
    "changes",
    [{"concurrency": 1}, {"timeout_s": 9.0}, {"requests_per_minute": 5}, {"cache_max_bytes": 10**9}, {"prompt": "cot"}],
    ids=lambda changes: next(iter(changes)),
)
async def test_what_does_not_decide_the_reply_does_not_change_the_key(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "replies.sqlite"
    async with FakeServer() as server, client_of("openai", server, cache_path=path) as client:
        await client.complete(HELLO)
    async with client_of("openai", server, cache_path=path, cache_mode="replay", **changes) as client:
        assert (await client.complete(HELLO)).cached


async def test_the_keys_of_the_first_version_still_hold(tmp_path: Path) -> None:
    # The sha256 of {"identity":"","max_tokens":512,"messages":[{"content":"hello","role":"user"}],"model":"tiny",
    # "seed":0,"temperature":0.0,"top_p":1.0}, computed apart.
    path = tmp_path / "replies.sqlite"
    async with FakeServer() as server, client_of("openai", server, cache_path=path) as client:
        await client.complete(HELLO)
    (key,) = sqlite3.connect(path).execute("SELECT key FROM replies").fetchone()
    assert key == "4995f56a3aca9bb951f3cb03126f1b2c0c9bc9b1b45b65c036b7089da9f2fdc8"


async def test_a_key_is_not_in_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    async with FakeServer() as server, client_of("openai", server, cache_path=path) as client:
        await client.complete(HELLO)
    assert server.headers[0]["authorization"] == "Bearer sk-secret"
    assert not [file for file in tmp_path.iterdir() if b"sk-secret" in file.read_bytes()]


async def test_failures_are_never_cached(tmp_path: Path) -> None:
    async with (
        FakeServer(chat(None)) as server,
        client_of("openai", server, cache_path=tmp_path / "c.sqlite", malformed_retries=0) as client,
    ):
        with pytest.raises(GeneratorError):
            await client.complete(HELLO)
        assert (await client.complete(HELLO)).text == "Paris"


async def test_refresh_asks_anew_and_overwrites_and_off_neither_reads_nor_writes(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    async with FakeServer(default=numbered([])) as server:
        said = []
        for mode in ("use", "off", "use", "refresh", "use"):
            async with client_of("openai", server, cache_path=path, cache_mode=mode) as client:
                said.append((await client.complete(HELLO)).text)
    assert said == ["reply 1", "reply 2", "reply 1", "reply 3", "reply 3"]


Everything = tuple[Answered, bool | None, tuple[Sample, ...], tuple[float, ...], Completion]


async def everything(client: GeneratorClient) -> Everything:
    """Ask in every way that the rewards and evaluations do."""
    return (
        await client.answer(QUESTION, DOCUMENTS),
        await LLMJudge(client.complete)(QUESTION, "Lyon"),
        await client.samples(QUESTION, DOCUMENTS, 3),
        await client.answer_logprobs(QUESTION, DOCUMENTS, "Paris"),
        await client.complete_text("Once upon"),
    )


def scoring_routes() -> dict[str, Any]:
    def completions(request: dict[str, Any]) -> Reply:
        if isinstance(request["prompt"], str):
            return as_json({"model": "tiny", "choices": [{"text": " a time"}]})
        scores = [None, *({str(token): {"logprob": -token / 3}} for token in request["prompt"][1:])]
        return as_json({"model": "tiny", "choices": [{"text": "x", "prompt_logprobs": scores}]})

    return {
        "/tokenize": lambda r: as_json({"tokens": [1, 2, 3] if "messages" in r else [7, 8]}),
        "/v1/completions": completions,
    }


@pytest.mark.parametrize("model", ["tiny", None])
async def test_a_run_is_replayed_with_the_generator_switched_off_bit_for_bit(tmp_path: Path, model: str | None) -> None:
    path = tmp_path / "replies.sqlite"
    async with (
        FakeServer(default=numbered([]), routes=scoring_routes()) as server,
        client_of("openai", server, cache_path=path, model=model) as client,
    ):
        first = await everything(client)
    asked = len(server.requests)
    # No server, no key: an address that nobody has, and an environment without anything.
    config = GeneratorConfig("https://gone.example/v1", model=model, cache_path=path, cache_mode="replay")
    async with GeneratorClient(config, environment={}) as client:
        assert await client.ready() == "tiny"
        again = await everything(client)
    assert len(server.requests) == asked and client.stats.requests == 0
    assert again[:4] == first[:4] and again[4].text == first[4].text
    assert [value.hex() for value in again[3]] == [value.hex() for value in first[3]]


async def test_what_is_missing_in_a_replay_is_an_error_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    async with FakeServer() as server, client_of("openai", server, cache_path=path) as client:
        await client.complete(HELLO)
    async with client_of("openai", server, cache_path=path, cache_mode="replay") as client:
        with pytest.raises(GeneratorError, match=r"cache_mode=replay: no reply of 'tiny'.*replies\.sqlite"):
            await client.complete([{"role": "user", "content": "something else"}])
        assert client.stats.failures == 1


async def test_a_replay_without_a_file_is_refused(tmp_path: Path) -> None:
    config = GeneratorConfig(cache_path=tmp_path / "none.sqlite", cache_mode="replay")
    with pytest.raises(ConfigError, match="cache_path"):
        GeneratorClient(config)
    assert not (tmp_path / "none.sqlite").exists()


async def test_a_replay_checks_the_context_of_the_model_that_answered(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    async with (
        FakeServer(models=[{"id": "tiny", "max_model_len": 8000}]) as server,
        client_of("openai", server, cache_path=path) as client,
    ):
        await client.ready()
    async with client_of("openai", server, cache_path=path, cache_mode="replay", max_tokens=2000) as client:
        with pytest.raises(GeneratorError, match="context of 8000"):
            await client.ready()


async def test_a_replay_of_an_unnamed_model_needs_a_cache_that_knows_only_one(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    for name in ("tiny", "large"):
        async with (
            FakeServer(models=[{"id": name}]) as server,
            client_of("openai", server, cache_path=path, model=None) as client,
        ):
            await client.ready()
    config = GeneratorConfig("http://127.0.0.1:9/v1", cache_path=path, cache_mode="replay")
    async with GeneratorClient(config) as client:
        with pytest.raises(GeneratorError, match=r"known: large, tiny.*set model"):
            await client.ready()


class FullDisk(ReplyCache):
    """A cache whose disk is full after a few pages."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        assert self._writer is not None
        pages = self._writer.execute("PRAGMA page_count").fetchone()[0]
        self._writer.execute(f"PRAGMA max_page_count={pages + 1}")


async def test_a_reply_that_cannot_be_kept_is_not_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stats = GeneratorStats()
    store = ReplyStore(FullDisk(tmp_path / "c.sqlite"), "use", stats)

    async def fetch() -> Completion:
        return Completion("x" * 20_000)

    with caplog.at_level(logging.WARNING):
        for key in ("a", "b"):
            assert (await store.reply(key, "tiny", True, fetch)).text == "x" * 20_000
    await store.aclose()
    assert stats.cache_failures == 2
    warned = [record.message for record in caplog.records]
    assert len(warned) == 1 and "full" in warned[0] and "c.sqlite" in warned[0]


async def test_an_entry_that_is_no_reply_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    async with FakeServer() as server, client_of("openai", server, cache_path=path) as client:
        await client.complete(HELLO)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE replies SET reply = ?", (json.dumps({"text": 7, "logprobs": []}),))
    async with client_of("openai", server, cache_path=path) as client:
        with pytest.raises(GeneratorError, match=r"c\.sqlite holds something else"):
            await client.complete(HELLO)
