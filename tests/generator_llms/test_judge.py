"""The judge pays for a clear yes and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AsyncExitStack

import pytest

from generator_llms.client import GeneratorClient
from generator_llms.config import GeneratorConfig
from generator_llms.judge import LLMJudge, judge_by, judge_identity, open_judge, parse_verdict
from generator_llms.prompts import Message
from generator_llms.replies import Completion
from tests.generator_llms.fake_server import FakeServer, chat
from verl.errors import GeneratorError
from verl.types import Question

QUESTION = Question("q", "Who?", ("Ada",), "toy")


class Scripted:
    """A chat model that says what it is told to; an exception is raised."""

    def __init__(self, *replies: str | Exception) -> None:
        self.replies = list(replies)
        self.asked: list[list[Message]] = []
        self.bounds: list[int | None] = []

    async def __call__(self, messages: Sequence[Message], *, max_tokens: int | None = None) -> Completion:
        self.asked.append(list(messages))
        self.bounds.append(max_tokens)
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return Completion(reply)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("yes", True),
        ("Yes.", True),
        ("  **YES**, it does", True),
        ("no", False),
        ("No!", False),
        ("yes and no", None),
        ("no, well, yes", None),
        ("It is yes", None),
        ("Yesterday", None),
        ("None", None),
        ("nothing", None),
        ("yes_no", None),
        ("", None),
        ("42", None),
    ],
)
def test_only_a_clear_first_word_is_a_verdict(reply: str, verdict: bool | None) -> None:
    assert parse_verdict(reply) is verdict


@pytest.mark.parametrize(("reply", "verdict"), [("yes", True), ("no", False)])
async def test_a_clear_reply_is_asked_for_once(reply: str, verdict: bool) -> None:
    model = Scripted(reply)
    judge = LLMJudge(model)
    assert await judge(QUESTION, "Ada") is verdict
    assert (judge.stats.yes, judge.stats.no, judge.stats.abstained) == (int(verdict), int(not verdict), 0)
    assert model.bounds == [10]


async def test_an_unclear_reply_is_asked_for_once_more_with_the_reply_in_view() -> None:
    model = Scripted("yes and no", "no")
    assert await LLMJudge(model)(QUESTION, "Ada") is False
    assert [message["role"] for message in model.asked[1]] == ["system", "user", "assistant", "user"]
    assert model.asked[1][2]["content"] == "yes and no"
    assert model.asked[1] != model.asked[0]  # the same conversation would only return the cached reply


async def test_two_unclear_replies_are_an_abstention() -> None:
    judge = LLMJudge(Scripted("yes and no", "perhaps"))
    assert await judge(QUESTION, "Ada") is None
    assert (judge.stats.yes, judge.stats.no, judge.stats.abstained) == (0, 0, 1)


async def test_a_failure_is_not_a_verdict() -> None:
    judge = LLMJudge(Scripted(GeneratorError("down")))
    with pytest.raises(GeneratorError, match="down"):
        await judge(QUESTION, "Ada")
    assert (judge.stats.yes, judge.stats.no, judge.stats.abstained) == (0, 0, 0)


@pytest.mark.parametrize("shown", [True, False])
async def test_the_configuration_says_whether_the_judge_sees_the_question(shown: bool) -> None:
    async with (
        FakeServer(default=lambda r: chat("no")) as server,
        GeneratorClient(GeneratorConfig(server.url, shows_question=shown)) as client,
    ):
        await judge_by(client)(QUESTION, "Ada")
    assert (QUESTION.text in json.dumps(server.requests[-1]["messages"])) is shown


def test_what_verdicts_depend_on() -> None:
    shown, hidden = GeneratorConfig(model="j"), GeneratorConfig(model="j", shows_question=False)
    assert judge_identity(False, hidden, hidden) is False
    assert [judge_identity(True, None, own) for own in (shown, hidden)] == [True, [True, "without the question"]]
    assert [judge_identity(True, own, shown) for own in (shown, hidden)] == ["j", ["j", "without the question"]]


async def test_a_judge_of_its_own_is_asked_instead_of_the_generator_and_closed_in_the_end() -> None:
    async with (
        FakeServer(default=lambda r: chat("no")) as answers,
        FakeServer(default=lambda r: chat("yes")) as judges,
        GeneratorClient(GeneratorConfig(answers.url)) as generator,
    ):
        async with AsyncExitStack() as stack:
            own = await open_judge(GeneratorConfig(judges.url), generator, stack)
            shared = await open_judge(None, generator, stack)
            assert (await own(QUESTION, "Ada"), await shared(QUESTION, "Ada")) == (True, False)
        assert (len(judges.requests), len(answers.requests)) == (1, 1)
        assert await shared(QUESTION, "Eve") is False  # the generator is not the judge's to close
        with pytest.raises(RuntimeError, match="closed"):
            await own(QUESTION, "Eve")
