"""The generator client against a server that behaves, misbehaves, dies and comes back."""

from __future__ import annotations

import asyncio
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
GREETINGS = [[{"role": "user", "content": f"hello {i}"}] for i in range(12)]


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


async def test_a_request_that_hangs_is_given_up_and_repeated() -> None:
    async with FakeServer(Reply(hang=True)) as server, client_for(server, timeout_s=0.2) as client:
        assert (await client.complete(HELLO)).text == "Paris"
    assert len(server.requests) == 2


async def test_a_dated_version_of_the_model_is_the_model() -> None:
    async with FakeServer(chat("Paris", model="tiny-2025-01-01")) as server, client_for(server, model="tiny") as client:
        assert (await client.complete(HELLO)).text == "Paris"


@pytest.mark.parametrize("answered", ["tiny-large", "tinyer", "tiny-1"])
async def test_a_model_whose_name_only_begins_alike_is_another_one(answered: str) -> None:
    async with FakeServer(chat("Paris", model=answered)) as server, client_for(server, model="tiny") as client:
        with pytest.raises(GeneratorError, match="expected 'tiny'"):
            await client.complete(HELLO)


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
        pending = [asyncio.create_task(client.complete(greeting)) for greeting in GREETINGS]
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
            asked = (client.complete([{"role": "user", "content": str(i)}]) for i in range(40))
            outcomes = await asyncio.gather(*asked, return_exceptions=True)
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
        await asyncio.gather(*map(client.complete, GREETINGS))
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
        ("base_urls", ["http://127.0.0.1:8000/v1"]),
        ("base_urls", ["nowhere"]),
        ("requests_per_minute", 0),
        ("max_spend", 1.0),
        ("price_per_million_prompt", -1.0),
        ("cache_mode", "replay"),
        ("backend", "azure"),
        ("backend", "bedrock"),
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
    async with FakeServer(Reply(b"{}", status=500), Reply(b"null")) as server, client_for(server) as client:
        await client.complete(HELLO)
    told = [record for record in caplog.records if record.levelname == "WARNING" and "asking again" in record.message]
    assert client.stats.retries == 2
    assert len(told) == 1 and server.url in told[0].message
