"""A policy engine as a chat model: messages in, text out, for what a grammar asks besides its own conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from verl.agent.grammar.base import Message
from verl.agent.loop import Tokenizer, chat_prompt
from verl.agent.protocols import PolicyEngine, Sampling


class EngineChat:
    """Answers one conversation at a time with an engine; satisfies `verl.agent.grammar.base.Complete`.

    Args:
        sampling: of every reply; `max_tokens` bounds it.
    """

    def __init__(self, engine: PolicyEngine, tokenizer: Tokenizer, sampling: Sampling) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._sampling = replace(sampling, stop=())

    async def __call__(self, messages: Sequence[Message]) -> str:
        """Return the reply.

        Raises:
            EngineError: the conversation does not fit the model's context, or the engine died.
        """
        generation = await self._engine.generate(chat_prompt(self._tokenizer, list(messages)), self._sampling)
        return generation.text
