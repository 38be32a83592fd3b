"""What each backend sends, where it takes its key from, and what it refuses before anything is sent."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from generator_llms.client import GeneratorClient
from generator_llms.config import GeneratorConfig
from tests.generator_llms.backends import BACKENDS, KEYS, client_of, said
from tests.generator_llms.fake_server import FakeServer, as_json, claude
from verl.config import build
from verl.errors import ConfigError, GeneratorError

ROOT = Path(__file__).resolve().parents[2]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Ada."},
    {"role": "user", "content": "Really?"},
]


async def sent(backend: str, **changes: Any) -> tuple[FakeServer, dict[str, Any]]:
    """Return the server and the one request that `TALK` makes."""
    async with (
        FakeServer(default=lambda r: said(backend, "Yes.")) as server,
        client_of(backend, server, **changes) as client,
    ):
        completion = await client.complete(TALK, max_tokens=7)
    assert (completion.text, completion.finish) == ("Yes.", "stop")
    assert (client.stats.prompt_tokens, client.stats.completion_tokens) == (11, 3)
    return server, server.requests[0]


async def test_openai_sends_a_chat_with_a_bearer_token() -> None:
    server, request = await sent("openai", seed=5, top_p=0.5)
    assert server.paths == ["/v1/chat/completions"]
    assert server.headers[0]["authorization"] == "Bearer sk-secret"
    assert request == {
        "model": "tiny",
        "messages": TALK,
        "max_tokens": 7,
        "temperature": 0.0,
        "top_p": 0.5,
        "seed": 5,
    }


async def test_azure_sends_to_the_deployment_with_its_version_and_key() -> None:
    server, request = await sent("azure")
    assert server.paths == ["/openai/deployments/tiny/chat/completions?api-version=2024-10-21"]
    assert server.headers[0]["api-key"] == "sk-secret"
    assert request["messages"] == TALK and request["max_tokens"] == 7 and server.model_lists == 0


async def test_anthropic_sends_the_system_text_apart_under_the_version_that_takes_a_temperature() -> None:
    server, request = await sent("anthropic")
    assert server.paths == ["/v1/messages"]
    assert server.headers[0]["authorization"] == "Bearer sk-secret"
    assert server.headers[0]["anthropic-version"] == "2023-06-01"
    assert request == {
        "model": "tiny",
        "system": "Be brief.",
        "messages": TALK[1:],
        "max_tokens": 7,
        "temperature": 0.0,
    }


async def test_bedrock_names_the_model_in_the_path_and_the_version_in_the_body() -> None:
    server, request = await sent("bedrock", model="anthropic.claude-3-haiku-20240307-v1:0")
    assert server.paths == ["/model/anthropic.claude-3-haiku-20240307-v1:0/invoke"]
    assert server.headers[0]["authorization"] == "Bearer sk-secret"
    assert request == {
        "system": "Be brief.",
        "messages": TALK[1:],
        "max_tokens": 7,
        "temperature": 0.0,
        "anthropic_version": "bedrock-2023-05-31",
    }


async def test_a_version_that_refuses_a_temperature_gets_none() -> None:
    server, request = await sent("anthropic", api_version="2026-10-21", temperature=1.0)
    assert server.headers[0]["anthropic-version"] == "2026-10-21"
    assert "temperature" not in request and "top_p" not in request


def test_a_temperature_that_could_not_be_sent_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"temperature=0.*2026-10-21"):
        build(GeneratorConfig, {"backend": "anthropic", "api_version": "2026-10-21"})


@pytest.mark.parametrize(("stop", "finish"), [("max_tokens", "length"), ("stop_sequence", "stop"), ("odd", "odd")])
async def test_claude_says_why_it_stopped(stop: str, finish: str) -> None:
    async with FakeServer(claude("a", " b", stop=stop)) as server, client_of("anthropic", server) as client:
        completion = await client.complete(TALK)
    assert (completion.text, completion.finish) == ("a b", finish)


@pytest.mark.parametrize("backend", BACKENDS)
async def test_extra_fields_are_added_and_nulls_take_fields_out(backend: str) -> None:
    _, request = await sent(backend, extra_body={"temperature": None, "max_tokens": None, "more": [1]})
    assert request["more"] == [1]
    assert "temperature" not in request and "max_tokens" not in request


@pytest.mark.parametrize("backend", BACKENDS)
async def test_the_usual_variable_of_each_backend_is_read_unless_another_is_named(backend: str) -> None:
    async with FakeServer(default=lambda r: said(backend, "x")) as server:
        base = server.url if backend == "openai" else server.root
        config = GeneratorConfig(
            base, backend=backend, model="tiny", api_version="2024-10-21" if backend == "azure" else None,
            api_key_env="MY_KEY", aws_region="eu-test-1",
        )  # fmt: skip
        async with GeneratorClient(config, environment={**KEYS, "MY_KEY": "mine"}) as client:
            await client.complete(TALK)
    header = server.headers[0]["api-key" if backend == "azure" else "authorization"]
    assert header.removeprefix("Bearer ") == "mine"


@pytest.mark.parametrize(
    ("backend", "url", "variable"),
    [
        ("openai", "https://api.example.com/v1", "OPENAI_API_KEY"),
        ("azure", "https://example.openai.azure.com", "AZURE_OPENAI_API_KEY"),
        ("anthropic", GeneratorConfig().base_url, "ANTHROPIC_API_KEY"),
    ],
)
def test_a_remote_endpoint_without_a_key_is_refused(backend: str, url: str, variable: str) -> None:
    config = GeneratorConfig(url, backend=backend, model="m", api_version="2024-10-21" if backend == "azure" else None)
    with pytest.raises(ConfigError, match=variable):
        GeneratorClient(config, environment={})


def test_bedrock_without_a_region_is_refused() -> None:
    with pytest.raises(ConfigError, match="aws_region"):
        GeneratorClient(GeneratorConfig(backend="bedrock", model="m"), environment={})


@pytest.mark.skipif(importlib.util.find_spec("boto3") is not None, reason="boto3 is installed")
def test_bedrock_without_boto3_and_without_a_key_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"boto3.*AWS_BEARER_TOKEN_BEDROCK"):
        GeneratorClient(GeneratorConfig(backend="bedrock", model="m"), environment={"AWS_REGION": "eu-test-1"})


def test_vendors_have_their_own_address_unless_one_is_given() -> None:
    environment = {"ANTHROPIC_API_KEY": "k", "AWS_BEARER_TOKEN_BEDROCK": "k", "AWS_REGION": "eu-test-1"}
    from generator_llms.backends import open_backends

    found = [
        open_backends(GeneratorConfig(backend=name, model="m"), environment)[0].where
        for name in ("anthropic", "bedrock")
    ]
    assert found == ["https://api.anthropic.com", "https://bedrock-runtime.eu-test-1.amazonaws.com"]


@pytest.mark.parametrize("backend", ["anthropic", "bedrock"])
async def test_claude_has_no_log_probabilities_and_no_plain_completions(backend: str) -> None:
    async with FakeServer() as server, client_of(backend, server) as client:
        with pytest.raises(ConfigError, match="log-probabilities"):
            await client.complete(TALK, logprobs=True)
        with pytest.raises(ConfigError, match="plain completions"):
            await client.complete_text("Once upon")
    assert server.requests == []


async def test_a_model_of_claude_is_looked_up_in_the_list() -> None:
    async with FakeServer(claude("x"), models=[{"id": "other"}]) as server, client_of("anthropic", server) as client:
        with pytest.raises(GeneratorError, match="serves other, expected 'tiny'"):
            await client.complete(TALK)


async def test_a_plain_completion_is_read_with_its_log_probabilities() -> None:
    choice = {"text": " a time", "finish_reason": "stop", "logprobs": {"token_logprobs": [-0.25, -1.5]}}
    reply = as_json({"model": "tiny", "choices": [choice], "usage": {"prompt_tokens": 2, "completion_tokens": 2}})
    async with FakeServer(reply) as server, client_of("openai", server) as client:
        completion = await client.complete_text("Once upon", max_tokens=3, stop=["\n"], logprobs=True)
    assert (completion.text, completion.logprobs) == (" a time", (-0.25, -1.5))
    assert server.paths == ["/v1/completions"]
    assert server.requests[0] == {
        "model": "tiny",
        "prompt": "Once upon",
        "max_tokens": 3,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 0,
        "stop": ["\n"],
        "logprobs": 0,
    }


@pytest.mark.parametrize("value", [None, "x", 0.5, float("inf")])
async def test_a_log_probability_that_is_none_is_asked_for_again(value: Any) -> None:
    broken = as_json({"model": "tiny", "choices": [{"text": "a", "logprobs": {"token_logprobs": [value]}}]})
    good = as_json({"model": "tiny", "choices": [{"text": "a", "logprobs": {"token_logprobs": [-1]}}]})
    async with FakeServer(broken, good) as server, client_of("openai", server) as client:
        assert (await client.complete_text("x", logprobs=True)).logprobs == (-1.0,)


async def test_a_base_model_reads_the_conversation_as_text_and_stops_before_the_next_turn() -> None:
    reply = as_json({"model": "tiny", "choices": [{"text": " Yes."}]})
    async with FakeServer(reply) as server, client_of("openai", server, style="completion") as client:
        assert (await client.complete(TALK)).text == " Yes."
    assert server.paths == ["/v1/completions"]
    request = server.requests[0]
    assert request["prompt"] == "Be brief.\n\nUser: Who?\n\nAssistant: Ada.\n\nUser: Really?\n\nAssistant:"
    assert request["stop"] == ["\nUser:", "\nAssistant:"]


def test_nothing_of_a_vendor_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, generator_llms.client as c, generator_llms.config as g;"
        "c.GeneratorClient(g.GeneratorConfig());"
        "print([name for name in ('openai', 'anthropic', 'aiohttp', 'boto3', 'httpx2') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "[]", run.stderr
