"""The generator client against a server that behaves, misbehaves, dies and comes back."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from generator_llms.client import GeneratorClient
from generator_llms.config import GeneratorConfig
from tests.generator_llms.fake_server import FakeServer, Reply, chat
from verl.config import build
from verl.errors import ConfigError, GeneratorError
from verl.types import Document, Question

QUESTION = Question("q/1", "Where is the Louvre?", ("Paris",), "toy")
DOCUMENTS = tuple(Document(str(i), f"Title {i}", "word " * 30) for i in range(4))
HELLO = [{"role": "user", "content": "hello"}]


def client_for(server: FakeServer, **changes: Any) -> GeneratorClient:
    settings = {"base_url": server.url, "timeout_s": 5.0, "retry_window_s": 5.0, **changes}
    return GeneratorClient(GeneratorConfig(**settings), environment={})


async def test_a_reply_is_read_whole_and_the_request_is_bounded() -> None:
    async with FakeServer() as server, client_for(server, max_tokens=40, seed=7) as client:
        completion = await client.complete(HELLO)
    assert (completion.text, completion.finish, completion.prompt_tokens, completion.completion_tokens) == (
        "Paris",
        "stop",
        11,
        3,
    )
    request = server.requests[0]
    assert request["model"] == "tiny" and request["messages"] == HELLO
    assert (request["max_tokens"], request["temperature"], request["top_p"], request["seed"]) == (40, 0.0, 1.0, 7)
    assert "logprobs" not in request
    assert client.stats.prompt_tokens == 11 and client.stats.completion_tokens == 3


async def test_extra_fields_and_logprobs_are_passed_on() -> None:
    body = (
        b'{"model": "tiny", "choices": [{"message": {"content": "a b"}, "finish_reason": "stop",'
        b' "logprobs": {"content": [{"token": "a", "logprob": -0.5}, {"token": " b", "logprob": -1}]}}]}'
    )
    async with FakeServer(Reply(body)) as server, client_for(server, extra_body={"top_k": 1}) as client:
        completion = await client.complete(HELLO, logprobs=True)
    assert completion.logprobs == (-0.5, -1.0)
    assert server.requests[0]["logprobs"] is True and server.requests[0]["top_k"] == 1


async def test_logprobs_that_were_asked_for_but_did_not_come_are_an_error() -> None:
    async with (
        FakeServer(default=lambda request: chat("x")) as server,
        client_for(server, malformed_retries=0) as client,
    ):
        with pytest.raises(GeneratorError, match="log-probabilities"):
            await client.complete(HELLO, logprobs=True)


BROKEN = {
    "500": Reply(b'{"error": {"message": "out of memory"}}', status=500),
    "503 with html": Reply(b"<html>down</html>", status=503, headers={"content-type": "text/html"}),
    "429": Reply(b"{}", status=429, headers={"retry-after": "0.05"}),
    "empty choices": Reply(b'{"model": "tiny", "choices": []}'),
    "no choices": Reply(b'{"model": "tiny"}'),
    "null": Reply(b"null"),
    "list": Reply(b"[1, 2]"),
    "no content": chat(None),
    "truncated json": Reply(b'{"model": "tiny", "choices": [{"mess'),
    "empty body": Reply(b""),
    "shorter than it claims": Reply(b'{"model": "tiny"', claim=5000),
    "not utf-8": Reply(b'{"model": "tiny", "choices": [{"message": {"content": "\xff\xfe"}}]}'),
    "lone surrogate": Reply(b'{"model": "tiny", "choices": [{"message": {"content": "\\ud800"}}]}'),
    "100,000 characters": chat("x" * 100_000),
    "not json at all": Reply(b"hello", headers={"content-type": "text/plain"}),
}


@pytest.mark.parametrize("reply", BROKEN.values(), ids=list(BROKEN))
async def test_a_broken_reply_is_asked_for_again(reply: Reply) -> None:
    async with FakeServer(reply) as server, client_for(server) as client:
        completion = await client.complete(HELLO)
    assert completion.text == "Paris"
    assert len(server.requests) == 2 and client.stats.retries == 1 and client.stats.failures == 0


@pytest.mark.parametrize("reply", BROKEN.values(), ids=list(BROKEN))
async def test_replies_that_stay_broken_are_an_error_that_names_the_endpoint(reply: Reply) -> None:
    async with (
        FakeServer(default=lambda request: reply) as server,
        client_for(server, malformed_retries=1, retry_window_s=0.6) as client,
    ):
        with pytest.raises(GeneratorError, match=server.url):
            await client.complete(HELLO)
    assert len(server.requests) >= 2 and client.stats.failures == 1


async def test_a_request_that_hangs_is_given_up_and_repeated() -> None:
    async with FakeServer(Reply(hang=True)) as server, client_for(server, timeout_s=0.2) as client:
        assert (await client.complete(HELLO)).text == "Paris"
    assert len(server.requests) == 2


async def test_a_longer_retry_after_than_the_window_fails_at_once() -> None:
    busy = Reply(b"{}", status=429, headers={"retry-after": "3600"})
    async with FakeServer(busy) as server, client_for(server) as client:
        with pytest.raises(GeneratorError, match="429"):
            await client.complete(HELLO)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "reply",
    [
        Reply(b'{"error": {"message": "prompt too long"}}', status=400),
        Reply(b'{"error": {"message": "no key"}}', status=401),
        chat(None, refusal="I will not"),
        chat("", finish="content_filter"),
        chat("Paris", model="another"),
    ],
    ids=["400", "401", "refusal", "content filter", "another model"],
)
async def test_what_no_retry_can_cure_fails_at_once(reply: Reply) -> None:
    async with FakeServer(reply) as server, client_for(server) as client:
        with pytest.raises(GeneratorError, match=server.url):
            await client.complete(HELLO)
    assert len(server.requests) == 1


async def test_a_dated_version_of_the_model_is_the_model() -> None:
    async with FakeServer(chat("Paris", model="tiny-2025-01-01")) as server, client_for(server, model="tiny") as client:
        assert (await client.complete(HELLO)).text == "Paris"


async def test_a_model_that_is_not_served_is_an_error_that_lists_the_served_ones() -> None:
    async with FakeServer() as server, client_for(server, model="large") as client:
        with pytest.raises(GeneratorError, match=r"serves tiny, expected 'large'"):
            await client.complete(HELLO)
    assert server.requests == []


async def test_a_context_shorter_than_configured_is_an_error() -> None:
    async with (
        FakeServer(models=[{"id": "tiny", "max_model_len": 1024}]) as server,
        client_for(server, max_prompt_tokens=1000, max_tokens=25) as client,
    ):
        with pytest.raises(GeneratorError, match="1000 \\+ 25 = 1025"):
            await client.ready()


@pytest.mark.parametrize("models", [[], [{"name": "x"}], ["x"]])
async def test_a_malformed_list_of_models_is_an_error(models: list[Any]) -> None:
    async with FakeServer(models=models) as server, client_for(server, malformed_retries=0) as client:
        with pytest.raises(GeneratorError, match="models"):
            await client.ready()


async def test_an_endpoint_without_a_list_of_models_needs_a_name() -> None:
    async with FakeServer(default=lambda r: chat("Paris", model="renamed")) as server:
        async with client_for(server, check_model=False, model="mine") as client:
            assert (await client.complete(HELLO)).text == "Paris"
        assert server.model_lists == 0 and server.requests[0]["model"] == "mine"
        async with client_for(server, check_model=False) as client:
            with pytest.raises(GeneratorError, match="name the model"):
                await client.complete(HELLO)


async def test_a_generator_that_is_restarted_within_the_window_loses_no_request() -> None:
    async with (
        FakeServer(default=lambda r: Reply(chat("Paris").body, delay=0.05)) as server,
        client_for(server, concurrency=4, retry_window_s=30.0) as client,
    ):
        await client.ready()
        pending = [asyncio.create_task(client.complete(HELLO)) for _ in range(12)]
        while not server.requests:
            await asyncio.sleep(0.005)
        await server.stop()
        await asyncio.sleep(0.3)
        await server.start()
        replies = await asyncio.gather(*pending)
    assert [reply.text for reply in replies] == ["Paris"] * 12
    assert client.stats.retries > 0


async def test_all_callers_of_a_dead_generator_fail_together_not_one_after_the_other() -> None:
    server = FakeServer()
    await server.start()
    await server.stop()
    async with client_for(server, retry_window_s=0.5, concurrency=1) as client:
        # One after the other these would need 40 windows, 20 s.
        async with asyncio.timeout(10):
            outcomes = await asyncio.gather(*(client.complete(HELLO) for _ in range(40)), return_exceptions=True)
        assert all(isinstance(outcome, GeneratorError) for outcome in outcomes)
        assert client.stats.failures == 40
        await server.start()
        assert (await client.complete(HELLO)).text == "Paris"  # a failed check is not remembered
    await server.stop()


async def test_concurrency_is_bounded() -> None:
    async with (
        FakeServer(default=lambda r: Reply(chat("Paris").body, delay=0.02)) as server,
        client_for(server, concurrency=3) as client,
    ):
        await asyncio.gather(*(client.complete(HELLO) for _ in range(12)))
    assert server.most_in_flight == 3 and server.model_lists == 1


async def test_a_cancelled_caller_does_not_end_the_check_for_others() -> None:
    async with FakeServer() as server, client_for(server) as client:
        first = asyncio.create_task(client.ready())
        second = asyncio.create_task(client.ready())
        await asyncio.sleep(0)
        first.cancel()
        assert await second == "tiny"


async def test_the_key_comes_from_the_named_variable() -> None:
    async with FakeServer() as server:
        config = GeneratorConfig(base_url=server.url, api_key_env="MY_KEY")
        async with GeneratorClient(config, environment={"MY_KEY": "secret"}) as client:
            await client.complete(HELLO)
        async with GeneratorClient(config, environment={}) as client:
            await client.complete(HELLO)
    assert [h["authorization"] for h in server.headers] == ["Bearer secret", "Bearer EMPTY"]


def test_a_remote_endpoint_without_a_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        GeneratorClient(GeneratorConfig(base_url="https://api.example.com/v1"), environment={})


async def test_an_answer_is_what_follows_the_last_answer_tag() -> None:
    raw = "The seat of X is Rome. <answer>Rome</answer> So <answer> Paris </answer> it is."
    async with FakeServer(chat(raw, finish="length")) as server, client_for(server) as client:
        answered = await client.answer(QUESTION, DOCUMENTS)
    assert (answered.answer, answered.raw, answered.truncated) == ("Paris", raw, True)
    assert (answered.documents_used, answered.documents_dropped) == (4, 0)
    system, user = server.requests[0]["messages"]
    assert user == {"role": "user", "content": "Where is the Louvre?"}
    assert system["content"].count("(Title: ") == 4


async def test_documents_that_do_not_fit_are_dropped_from_the_end_and_counted() -> None:
    async with FakeServer() as server, client_for(server, max_prompt_tokens=180) as client:
        answered = await client.answer(QUESTION, DOCUMENTS)
    assert answered.documents_used + answered.documents_dropped == 4
    assert 0 < answered.documents_used < 4
    assert client.stats.documents_dropped == answered.documents_dropped
    content = server.requests[0]["messages"][0]["content"]
    assert f"Title {answered.documents_used - 1}" in content and f"Title {answered.documents_used}" not in content


async def test_a_question_longer_than_the_prompt_is_an_error_and_asks_nothing() -> None:
    async with FakeServer() as server, client_for(server, max_prompt_tokens=40) as client:
        with pytest.raises(GeneratorError, match=r"q/1.*max_prompt_tokens=40"):
            await client.answer(QUESTION, DOCUMENTS)
    assert server.requests == []


@pytest.mark.parametrize("prompt", ["zero_shot", "cot"])
async def test_prompts_without_context_show_no_documents(prompt: str) -> None:
    async with FakeServer() as server, client_for(server, prompt=prompt) as client:
        answered = await client.answer(QUESTION, DOCUMENTS)
    assert "Title" not in str(server.requests[0]["messages"])
    assert (answered.documents_used, answered.documents_dropped) == (0, 0)


async def test_what_was_cached_needs_no_server(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    async with FakeServer() as server, client_for(server, cache_path=path, model="tiny") as client:
        first = await client.answer(QUESTION, DOCUMENTS)
        second = await client.answer(QUESTION, DOCUMENTS)
    assert first == second and len(server.requests) == 1
    async with client_for(server, cache_path=path, model="tiny", retry_window_s=0.0) as client:
        assert await client.answer(QUESTION, DOCUMENTS) == first
        assert client.stats.cached == 1


@pytest.mark.parametrize(
    "changes",
    [{"temperature": 0.5}, {"seed": 1}, {"max_tokens": 9}, {"model_identity": "b"}, {"extra_body": {"top_k": 1}}],
    ids=lambda changes: next(iter(changes)),
)
async def test_another_parameter_is_another_entry(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "replies.sqlite"
    async with FakeServer() as server:
        for settings in ({}, changes):
            async with client_for(server, cache_path=path, model="tiny", **settings) as client:
                await client.complete(HELLO)
    assert len(server.requests) == 2


async def test_failures_are_never_cached(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"
    async with (
        FakeServer(chat(None)) as server,
        client_for(server, cache_path=path, malformed_retries=0) as client,
    ):
        with pytest.raises(GeneratorError):
            await client.complete(HELLO)
        assert (await client.complete(HELLO)).text == "Paris"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("base_url", "localhost:8000"),
        ("base_url", "http://localhost:99999/v1"),
        ("max_tokens", 0),
        ("concurrency", 0),
        ("timeout_s", 0.0),
        ("timeout_s", float("inf")),
        ("retry_window_s", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("prompt", "contexts"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key):
        build(GeneratorConfig, {key: value})


def test_a_key_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="api_key_env") as error:
        build(GeneratorConfig, {"base_url": "https://user:secret@host.example/v1"})
    assert "secret" not in str(error.value)


async def test_the_first_retry_is_told_so_that_waiting_does_not_look_like_hanging(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with FakeServer(BROKEN["500"], BROKEN["null"]) as server, client_for(server) as client:
        await client.complete(HELLO)
    told = [record for record in caplog.records if record.levelname == "WARNING" and "asking again" in record.message]
    assert client.stats.retries == 2
    assert len(told) == 1 and server.url in told[0].message
