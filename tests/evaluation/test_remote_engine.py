"""An endpoint as a policy engine: what is sent, what is believed, and that a protocol can be played over it."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.agent.fakes import CharTokenizer, DictSearch, docs, question
from tests.generator_llms.fake_server import FakeServer, Reply, chat
from verl.agent.grammar.search_r1 import SearchR1Config, SearchR1Grammar
from verl.agent.loop import run
from verl.agent.protocols import Sampling
from verl.errors import ConfigError, EngineError
from verl.evaluation.remote_engine import RemoteConfig, RemoteEngine, Transcript
from verl.types import Stop

SAMPLING = Sampling(temperature=0.5, top_p=0.9, top_k=5, max_tokens=40, stop=("</search>", "</answer>"), seed=3)
TOKENS = RemoteConfig("http://h/v1", "m", tokenizer="t", retry_window_s=5)


class Chars(CharTokenizer):
    """Characters, special ones included."""

    def decode(self, token_ids: Any, **kwargs: Any) -> str:
        return "".join(map(chr, token_ids))


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with FakeServer(routes={"/tokenize": lambda request: Reply(b"{}", status=404)}) as started:
        yield started


def completion(text: str | None, finish: str = "stop", **more: Any) -> Reply:
    return Reply(json.dumps({"choices": [{"index": 0, "text": text, "finish_reason": finish, **more}]}).encode())


def engine(server: FakeServer, mode: str, **more: Any) -> RemoteEngine:
    config = replace(TOKENS, base_url=server.url, mode=mode, **more)
    return RemoteEngine(config, Transcript() if mode == "chat" else Chars(), {"OPENAI_API_KEY": "secret"})


async def test_vllm_takes_and_returns_token_ids(server: FakeServer) -> None:
    server.script = [completion("ab</search>", token_ids=[7, 8, 9], stop_reason="</search>")]
    async with engine(server, "tokens") as remote:
        made = await remote.generate((1, 2), SAMPLING)
    assert (made.ids, made.text, made.finish) == ((7, 8, 9), "ab</search>", "stop")
    assert all(math.isnan(value) for value in made.logprobs) and len(made.logprobs) == 3
    sent = server.requests[-1]
    assert sent["prompt"] == [1, 2] and sent["include_stop_str_in_output"] and sent["return_token_ids"]
    assert (sent["temperature"], sent["top_p"], sent["top_k"], sent["max_tokens"], sent["seed"]) == (0.5, 0.9, 5, 40, 3)
    assert sent["stop"] == ["</search>", "</answer>"] and server.headers[0]["authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("text", "reason", "expected"),
    [
        ("<think>x</think><search>q", None, "<think>x</think><search>q</search>"),
        ("<search>q</search><answer>Rome", None, "<search>q</search><answer>Rome</answer>"),
        ("so <search>q", "</answer>", "so <search>q</answer>"),
        ("<search>q</search>", "</search>", "<search>q</search>"),
        ("no tag at all", None, "no tag at all"),
    ],
)
async def test_a_stop_string_that_was_cut_off_is_put_back(
    server: FakeServer, text: str, reason: str | None, expected: str
) -> None:
    server.script = [completion(text, stop_reason=reason)]
    async with engine(server, "text") as remote:
        made = await remote.generate(tuple(map(ord, "p\0")), SAMPLING)
    assert made.text == expected and made.ids == tuple(map(ord, expected))
    assert server.requests[0]["prompt"] == "p\0" and "top_k" not in server.requests[0]


async def test_a_reply_at_its_bound_is_not_completed(server: FakeServer) -> None:
    server.script = [completion("<search>q", finish="length")]
    async with engine(server, "text") as remote:
        made = await remote.generate((65,), SAMPLING)
    assert (made.text, made.finish) == ("<search>q", "length")


async def test_a_protocol_is_played_over_a_chat_endpoint(server: FakeServer) -> None:
    server.script = [chat("I look. <search>a"), chat("<answer>Rome")]
    grammar = SearchR1Grammar(SearchR1Config())
    transcript = Transcript()
    config = replace(TOKENS, base_url=server.url, mode="chat", extra_body={"continue_final_message": True})
    async with RemoteEngine(config, transcript, {}) as remote:
        search = DictSearch({"a": docs("a1")})
        trajectory = await run(question(text="Where?"), grammar, remote, search, transcript, Sampling(temperature=0))
    assert (trajectory.stop, trajectory.answer, trajectory.searches) == (Stop.FINISHED, "Rome", 1)
    first, second = (sent["messages"] for sent in server.requests)
    assert first == grammar.prompt_messages(question(text="Where?"))
    block = "\n\n<information>Doc 1(Title: Ta1) text a1</information>\n\n"
    assert second == [*first, {"role": "assistant", "content": "I look. <search>a</search>" + block}]
    assert server.requests[1]["continue_final_message"] and "authorization" not in server.headers[0]


@pytest.mark.parametrize(
    "bad", [Reply(b"{", 200), Reply(b'{"choices": []}'), Reply(b"oops", 500), Reply(b"slow down", 429)]
)
async def test_a_broken_reply_is_asked_for_again(server: FakeServer, bad: Reply) -> None:
    server.script = [bad, completion("ok", token_ids=[5])]
    async with engine(server, "tokens") as remote:
        assert (await remote.generate((1,), SAMPLING)).ids == (5,)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(b"no such model", 404), "status 404: no such model"),
        (completion("ok"), "no token_ids; the endpoint is no vLLM, set mode=text"),
        (completion(None), "no text"),
    ],
)
async def test_what_cannot_help_is_an_engine_error(server: FakeServer, reply: Reply, message: str) -> None:
    server.script = [reply]
    async with engine(server, "tokens") as remote:
        with pytest.raises(EngineError, match=message):
            await remote.generate((1,), SAMPLING)


async def test_an_endpoint_that_is_away_is_named() -> None:
    config = replace(TOKENS, base_url="http://127.0.0.1:9/v1", retry_window_s=0)
    async with RemoteEngine(config, Chars(), {}) as remote:
        with pytest.raises(EngineError, match=r"127.0.0.1:9/v1 failed .*ConnectError"):
            await remote.generate((1,), SAMPLING)


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(min_size=1)), min_size=1))
def test_a_transcript_can_be_read_back(said: list[tuple[str, str]]) -> None:
    transcript = Transcript()
    messages = [{"role": role, "content": text} for role, text in said]
    ids = transcript.apply_chat_template(messages)
    assert isinstance(ids, list) and transcript.messages(ids) == messages
    assert transcript.messages([*ids, *transcript.encode("go on")]) == [
        *messages,
        {"role": "assistant", "content": "go on"},
    ]


async def test_an_endpoint_with_another_tokenizer_is_refused_and_asked_once() -> None:
    wrong, right = [1, 2, 3], [*map(ord, "Who wrote <query>Emma</query> in 1815?")]
    for served, message in ((wrong, "with another tokenizer than remote.tokenizer=t"), (right, "")):
        reply = Reply(json.dumps({"tokens": served}).encode())
        made = lambda request: completion("ab", token_ids=[7, 8])  # noqa: E731
        async with FakeServer(routes={"/tokenize": lambda request, reply=reply: reply}, default=made) as server:
            async with engine(server, "tokens") as remote:
                if message:
                    with pytest.raises(EngineError, match=message):
                        await remote.generate((1, 2), SAMPLING)
                else:
                    assert [(await remote.generate((1, 2), SAMPLING)).ids for _ in range(2)] == [(7, 8)] * 2
            assert sum(path.endswith("/tokenize") for path in server.paths) == 1


def test_mode_and_tokenizer_must_fit() -> None:
    with pytest.raises(ValueError, match="set tokenizer, or mode=chat"):
        RemoteConfig("http://h/v1", "m")
    with pytest.raises(ConfigError, match="a Transcript is for chat"):
        RemoteEngine(TOKENS, Transcript(), {})
