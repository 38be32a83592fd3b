"""A yes/no judge for answers that match no gold literally. What is not a clear yes or no is an abstention."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Protocol

from generator_llms.client import GeneratorClient
from generator_llms.config import GeneratorConfig
from generator_llms.prompts import Message, judge_again, judge_messages
from generator_llms.replies import Completion
from verl.types import Question

_REPLY_TOKENS = 10
_WORD = re.compile(r"[^\W\d_]+")


class Complete(Protocol):
    """A chat model, for example `GeneratorClient.complete`."""

    async def __call__(self, messages: Sequence[Message], *, max_tokens: int | None = None) -> Completion:
        """Return the reply.

        Raises:
            GeneratorError: after bounded retries.
        """
        ...


@dataclass(slots=True)
class JudgeStats:
    """Verdicts so far."""

    yes: int = 0
    no: int = 0
    abstained: int = 0


class LLMJudge:
    """Asks a chat model whether an answer states one of the golds.

    Args:
        complete: the model that judges, better not the one that answers: `complete` of another `GeneratorClient`.
        show_question: whether it sees the question, which the published judge does not.
    """

    def __init__(self, complete: Complete, show_question: bool = True) -> None:
        self.stats = JudgeStats()
        self._complete = complete
        self._show_question = show_question

    async def __call__(self, question: Question, answer: str) -> bool | None:
        """Return the verdict; None, an abstention, when two replies in a row are neither yes nor no.

        Raises:
            GeneratorError: the model could not be asked.
        """
        messages = judge_messages(question, answer, self._show_question)
        reply = (await self._complete(messages, max_tokens=_REPLY_TOKENS)).text
        verdict = parse_verdict(reply)
        if verdict is None:
            again = judge_again(messages, reply)
            verdict = parse_verdict((await self._complete(again, max_tokens=_REPLY_TOKENS)).text)
        self._count(verdict)
        return verdict

    def _count(self, verdict: bool | None) -> None:
        if verdict is None:
            self.stats.abstained += 1
        elif verdict:
            self.stats.yes += 1
        else:
            self.stats.no += 1


def parse_verdict(reply: str) -> bool | None:
    """Return True or False if the first word is yes or no and the other one does not occur; else None."""
    words = [word.lower() for word in _WORD.findall(reply)]
    if not words or words[0] not in ("yes", "no"):
        return None
    other = "no" if words[0] == "yes" else "yes"
    return None if other in words else words[0] == "yes"


async def open_judge(config: GeneratorConfig | None, generator: GeneratorClient, stack: AsyncExitStack) -> LLMJudge:
    """Return a judge that asks a model of its own, closed by `stack`, or the generator itself if `config` is None."""
    return judge_by(await stack.enter_async_context(GeneratorClient(config)) if config else generator)


def judge_by(client: GeneratorClient) -> LLMJudge:
    """Return a judge that asks `client`, and shows it the question if its configuration says so."""
    return LLMJudge(client.complete, client.config.shows_question)


def judge_identity(judge: bool, config: GeneratorConfig | None, generator: GeneratorConfig) -> Any:
    """Return what verdicts depend on, for the parameters of a journal; false without a judge.

    Args:
        config: of the judge's own model; None if it is the generator itself.
    """
    if not judge:
        return False
    named = True if config is None else config.model
    # Left as it was where the question is shown, so that journals written before go on.
    return named if (config or generator).shows_question else [named, "without the question"]
