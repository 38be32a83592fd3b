"""Everything that can go wrong on the wire, for every backend: asked for again within bounds, or a clear error."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import pytest

from generator_llms.judge import LLMJudge
from tests.generator_llms.backends import BACKENDS, client_of, said
from tests.generator_llms.fake_server import FakeServer, Reply, as_json, chat, claude
from verl.errors import GeneratorError
from verl.types import Question

HELLO = [{"role": "user", "content": "hello"}]

PASSING: dict[str, Callable[[str], Reply]] = {
    "500": lambda b: Reply(b'{"error": {"message": "out of memory"}}', status=500),
    "503 with html": lambda b: Reply(b"<html>down</html>", status=503, headers={"content-type": "text/html"}),
    "429": lambda b: Reply(b"{}", status=429, headers={"retry-after": "0.01"}),
    "529 overloaded": lambda b: as_json(
        {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, status=529
    ),
    "408": lambda b: Reply(b"", status=408),
    "null": lambda b: Reply(b"null"),
    "list": lambda b: Reply(b"[1, 2]"),
    "number": lambda b: Reply(b"1e999"),
    "deeply nested": lambda b: Reply(b"[" * 100_000),
    "empty object": lambda b: Reply(b"{}"),
    "truncated json": lambda b: Reply(said(b, "Paris").body[:70]),
    "empty body": lambda b: Reply(b""),
    "shorter than it claims": lambda b: Reply(b'{"model": "tiny"', claim=5000),
    "not utf-8": lambda b: Reply(said(b, "Paris").body.replace(b"Paris", b"\xff\xfe")),
    "lone surrogate": lambda b: Reply(said(b, "Paris").body.replace(b"Paris", b"\\ud800")),
    "100,000 characters": lambda b: said(b, "x" * 100_000),
    "text is a number": lambda b: Reply(said(b, "Paris").body.replace(b'"Paris"', b"7")),
    "text is null": lambda b: Reply(said(b, "Paris").body.replace(b'"Paris"', b"null")),
    "not json at all": lambda b: Reply(b"hello", headers={"content-type": "text/plain"}),
}
OPENAI_PASSING = {
    "empty choices": as_json({"model": "tiny", "choices": []}),
    "choices of numbers": as_json({"model": "tiny", "choices": [1]}),
    "message is text": as_json({"model": "tiny", "choices": [{"message": "Paris"}]}),
}
CLAUDE_PASSING = {
    "empty content": claude(),
    "content is text": as_json({"model": "tiny", "content": "Paris"}),
    "only thinking": as_json({"model": "tiny", "content": [{"type": "thinking", "thinking": "Paris"}]}),
}
LASTING: dict[str, Callable[[str], Reply]] = {
    "400": lambda b: Reply(b'{"error": {"message": "prompt too long"}}', status=400),
    "401": lambda b: Reply(b'{"error": {"message": "wrong key"}}', status=401),
    "404": lambda b: Reply(b'{"message": "no such deployment"}', status=404),
    "another model": lambda b: said(b, "Paris", model="another"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", PASSING)
async def test_a_broken_reply_is_asked_for_again(backend: str, fault: str) -> None:
    async with (
        FakeServer(PASSING[fault](backend), default=lambda r: said(backend, "Paris")) as server,
        client_of(backend, server) as client,
    ):
        completion = await client.complete(HELLO)
    assert completion.text == "Paris"
    assert len(server.requests) == 2 and client.stats.retries == 1 and client.stats.failures == 0


@pytest.mark.parametrize(
    ("backend", "reply"),
    [("openai", reply) for reply in OPENAI_PASSING.values()]
    + [("anthropic", reply) for reply in CLAUDE_PASSING.values()],
    ids=[*OPENAI_PASSING, *CLAUDE_PASSING],
)
async def test_a_reply_without_its_parts_is_asked_for_again(backend: str, reply: Reply) -> None:
    async with (
        FakeServer(reply, default=lambda r: said(backend, "Paris")) as server,
        client_of(backend, server) as client,
    ):
        assert (await client.complete(HELLO)).text == "Paris"
    assert len(server.requests) == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", PASSING)
async def test_replies_that_stay_broken_are_an_error_that_names_the_endpoint(backend: str, fault: str) -> None:
    async with (
        FakeServer(default=lambda r: PASSING[fault](backend)) as server,
        client_of(backend, server, malformed_retries=1, retry_window_s=0.05) as client,
    ):
        with pytest.raises(GeneratorError, match=server.root):
            await client.complete(HELLO)
    assert len(server.requests) >= 2 and client.stats.failures == 1


@pytest.mark.parametrize("backend", ["openai", "anthropic"])
@pytest.mark.parametrize("fault", LASTING)
async def test_what_no_retry_can_cure_fails_at_once(backend: str, fault: str) -> None:
    async with FakeServer(LASTING[fault](backend)) as server, client_of(backend, server) as client:
        with pytest.raises(GeneratorError, match=server.root):
            await client.complete(HELLO)
    assert len(server.requests) == 1


@pytest.mark.parametrize("backend", ["azure", "bedrock"])
async def test_backends_that_rename_their_models_are_not_checked(backend: str) -> None:
    async with FakeServer(said(backend, "Paris", model="renamed")) as server, client_of(backend, server) as client:
        assert (await client.complete(HELLO)).text == "Paris"
    assert server.model_lists == 0


@pytest.mark.parametrize(
    ("backend", "reply"),
    [
        ("openai", chat(None, refusal="I will not")),
        ("openai", chat("", finish="content_filter")),
        ("azure", chat(None, refusal="I will not")),
        ("anthropic", claude("I", stop="refusal")),
        ("bedrock", claude(stop="refusal")),
    ],
)
async def test_a_refusal_is_an_error_and_not_an_answer(backend: str, reply: Reply) -> None:
    async with FakeServer(reply) as server, client_of(backend, server) as client:
        with pytest.raises(GeneratorError, match="refused"):
            await client.complete(HELLO)
    assert len(server.requests) == 1


@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_request_that_hangs_is_given_up_and_repeated(backend: str) -> None:
    async with (
        FakeServer(Reply(hang=True), default=lambda r: said(backend, "Paris")) as server,
        client_of(backend, server, timeout_s=0.3) as client,
    ):
        assert (await client.complete(HELLO)).text == "Paris"
    assert len(server.requests) == 2


@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_longer_retry_after_than_the_window_fails_at_once(backend: str) -> None:
    busy = Reply(b"{}", status=429, headers={"retry-after": "3600"})
    async with FakeServer(busy) as server, client_of(backend, server) as client:
        with pytest.raises(GeneratorError, match="429"):
            await client.complete(HELLO)
    assert len(server.requests) == 1


@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_server_that_is_not_there_is_an_error_that_names_it(backend: str) -> None:
    server = FakeServer()
    await server.start()
    await server.stop()
    async with client_of(backend, server, retry_window_s=0.02) as client:
        with pytest.raises(GeneratorError, match=server.root):
            await client.complete(HELLO)


@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_key_that_an_endpoint_repeats_is_in_no_message(backend: str) -> None:
    reply = Reply(b'{"error": {"message": "the key sk-secret is wrong"}}', status=401)
    async with FakeServer(reply) as server, client_of(backend, server) as client:
        with pytest.raises(GeneratorError, match=r"the key \*\*\* is wrong") as error:
            await client.complete(HELLO)
    assert "sk-secret" not in "".join(traceback.format_exception(error.value))


async def test_a_redirect_is_not_followed() -> None:
    async with FakeServer() as other:
        moved = Reply(b"", status=307, headers={"location": f"{other.url}/chat/completions"})
        async with FakeServer(moved) as server, client_of("openai", server) as client:
            with pytest.raises(GeneratorError, match="base_url"):
                await client.complete(HELLO)
        assert other.requests == []


@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_judge_that_says_yes_and_no_abstains(backend: str) -> None:
    async with (
        FakeServer(default=lambda r: said(backend, "yes and no")) as server,
        client_of(backend, server) as client,
    ):
        judge = LLMJudge(client.complete)
        assert await judge(Question("q", "Who?", ("Ada",), "toy"), "Eve") is None
    assert judge.stats.abstained == 1 and len(server.requests) == 2
