"""Log-probabilities of given answers and samples: what vLLM is asked, and what is believed."""

from __future__ import annotations

from typing import Any

import pytest

from generator_llms import prompts
from tests.generator_llms.backends import client_of
from tests.generator_llms.fake_server import FakeServer, Reply, as_json
from verl.errors import ConfigError, GeneratorError
from verl.types import Document, Question

QUESTION = Question("q/1", "Where is the Louvre?", ("Paris",), "toy")
DOCUMENTS = (Document("1", "Louvre", "A museum."),)
PROMPT, ANSWER = [5, 6, 7, 8], [20, 21]


def tokenize(request: dict[str, Any]) -> Reply:
    return as_json({"tokens": ANSWER if request.get("add_special_tokens") is False else PROMPT, "count": 1})


def scored(entries: Any, model: str = "tiny") -> Reply:
    usage = {"prompt_tokens": 6, "completion_tokens": 1}
    return as_json({"model": model, "choices": [{"text": "x", "prompt_logprobs": entries}], "usage": usage})


def entries_of(logprobs: list[float]) -> list[Any]:
    """Return what vLLM gives for the six tokens: nothing for the first, and the rank and text that nobody needs."""
    values = zip([*PROMPT[1:], *ANSWER], logprobs, strict=True)
    return [None, *({str(t): {"logprob": value, "rank": 3, "decoded_token": "?"}} for t, value in values)]


GOOD = scored(entries_of([-9.0, -9.0, -9.0, -0.5, -0.25]))


def server_of(*script: Reply) -> FakeServer:
    return FakeServer(*script, default=lambda request: GOOD, routes={"/tokenize": tokenize})


async def test_the_answer_alone_is_scored_after_the_prompt_that_answer_would_send() -> None:
    async with server_of() as server, client_of("openai", server) as client:
        logprobs = await client.answer_logprobs(QUESTION, DOCUMENTS, " Paris\n")
    assert logprobs == (-0.5, -0.25)
    asked = dict(zip(server.paths, server.requests, strict=True))
    assert sorted(server.paths) == ["/tokenize", "/tokenize", "/v1/completions"]
    assert {"model": "tiny", "messages": prompts.build("context", QUESTION, DOCUMENTS)} in server.requests
    assert {"model": "tiny", "prompt": "Paris", "add_special_tokens": False} in server.requests
    assert asked["/v1/completions"] == {
        "model": "tiny",
        "prompt": PROMPT + ANSWER,
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": 0,
    }


async def test_the_arguments_of_the_template_go_to_the_tokenizer_too() -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": False}, "top_k": 1}
    async with server_of() as server, client_of("openai", server, extra_body=extra) as client:
        await client.answer_logprobs(QUESTION, DOCUMENTS, "Paris")
    chats = [request for request in server.requests if "messages" in request]
    assert [request["chat_template_kwargs"] for request in chats] == [{"enable_thinking": False}]


async def test_a_base_model_scores_after_its_plain_prompt() -> None:
    async with server_of() as server, client_of("openai", server, style="completion") as client:
        await client.answer_logprobs(QUESTION, DOCUMENTS, "Paris")
    texts = [request["prompt"] for request in server.requests if isinstance(request.get("prompt"), str)]
    assert sorted(texts)[0] == " Paris" and sorted(texts)[1].endswith("\n\nAssistant:")


async def test_control_markers_in_an_answer_are_text() -> None:
    async with server_of() as server, client_of("openai", server) as client:
        await client.answer_logprobs(QUESTION, DOCUMENTS, "Paris<|im_end|>")
    assert [r["prompt"] for r in server.requests if isinstance(r.get("prompt"), str)] == ["Paris< |im_end|>"]


@pytest.mark.parametrize("answer", ["", " \n"])
async def test_an_empty_answer_is_an_error(answer: str) -> None:
    async with server_of() as server, client_of("openai", server) as client:
        with pytest.raises(GeneratorError, match=r"q/1.*empty answer"):
            await client.answer_logprobs(QUESTION, DOCUMENTS, answer)


async def test_an_answer_without_tokens_is_an_error() -> None:
    routes = {"/tokenize": lambda request: as_json({"tokens": [] if "prompt" in request else PROMPT})}
    async with FakeServer(routes=routes) as server, client_of("openai", server) as client:
        with pytest.raises(GeneratorError, match="0 tokens"):
            await client.answer_logprobs(QUESTION, DOCUMENTS, "\u200b")


BROKEN = {
    "none": scored(None),
    "too few": scored(entries_of([-9.0, -9.0, -9.0, -0.5, -0.25])[:-1]),
    "of other tokens": scored([None, *({"99": {"logprob": -1.0}} for _ in range(5))]),
    "null": scored([None] * 6),
    "positive": scored(entries_of([-9.0, -9.0, -9.0, 0.5, -0.25])),
    "no choices": as_json({"model": "tiny", "choices": []}),
    "truncated": Reply(GOOD.body[:60]),
    "500": Reply(b"", status=500),
}


@pytest.mark.parametrize("fault", BROKEN)
async def test_scores_that_cannot_be_believed_are_asked_for_again(fault: str) -> None:
    async with server_of(BROKEN[fault]) as server, client_of("openai", server) as client:
        assert await client.answer_logprobs(QUESTION, DOCUMENTS, "Paris") == (-0.5, -0.25)
    assert client.stats.retries == 1


async def test_an_endpoint_without_such_scores_is_an_error_that_says_so() -> None:
    async with (
        FakeServer(default=lambda r: scored(None), routes={"/tokenize": tokenize}) as server,
        client_of("openai", server, malformed_retries=0) as client,
    ):
        with pytest.raises(GeneratorError, match="vLLM"):
            await client.answer_logprobs(QUESTION, DOCUMENTS, "Paris")
    async with (
        FakeServer(routes={"/tokenize": lambda r: Reply(b"{}", status=404)}) as server,
        client_of("openai", server) as client,
    ):
        with pytest.raises(GeneratorError, match="404"):
            await client.answer_logprobs(QUESTION, DOCUMENTS, "Paris")


@pytest.mark.parametrize("backend", ["azure", "anthropic", "bedrock"])
async def test_other_backends_refuse_before_they_send(backend: str) -> None:
    async with FakeServer() as server, client_of(backend, server) as client:
        with pytest.raises(ConfigError, match="log-probabilities"):
            await client.answer_logprobs(QUESTION, DOCUMENTS, "Paris")
    assert server.requests == []


def said(request: dict[str, Any]) -> Reply:
    """Say the seed, with one log-probability that depends on it."""
    choice = {
        "message": {"content": f"seed {request.get('seed')}"},
        "logprobs": {"content": [{"logprob": -float(request.get("seed", 0))}]},
    }
    return as_json({"model": "tiny", "choices": [choice]})


async def test_samples_have_seeds_of_their_own_and_repeat() -> None:
    async with FakeServer(default=said) as server, client_of("openai", server, seed=40) as client:
        first = await client.samples(QUESTION, DOCUMENTS, 3)
        assert await client.samples(QUESTION, DOCUMENTS, 3) == first
    assert [(sample.text, sample.logprobs) for sample in first] == [
        ("seed 40", (-40.0,)),
        ("seed 41", (-41.0,)),
        ("seed 42", (-42.0,)),
    ]
    assert {request["temperature"] for request in server.requests} == {1.0}
    assert all(request["logprobs"] is True for request in server.requests)
    assert server.requests[0]["messages"] == prompts.build("context", QUESTION, DOCUMENTS)


async def test_samples_without_a_seed_are_still_n_requests() -> None:
    async with (
        FakeServer(default=said) as server,
        client_of("openai", server, seed=None, sample_temperature=0.5) as client,
    ):
        assert len(await client.samples(QUESTION, DOCUMENTS, 3)) == 3
    assert len(server.requests) == 3
    assert all(request["temperature"] == 0.5 and "seed" not in request for request in server.requests)


async def test_all_samples_fail_if_one_does() -> None:
    async with (
        FakeServer(default=lambda r: Reply(b"{}", status=400) if r["seed"] == 1 else said(r)) as server,
        client_of("openai", server) as client,
    ):
        with pytest.raises(GeneratorError, match="400"):
            await client.samples(QUESTION, DOCUMENTS, 3)
