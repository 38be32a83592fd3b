"""One question to a model, with everything that decides the reply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from generator_llms.prompts import Message


@dataclass(frozen=True, slots=True)
class Request:
    """What a backend translates into its own protocol, and what a cache key is made of.

    Attributes:
        messages: a conversation; empty for a plain completion of `prompt`.
        prompt: text to go on from, where there are no messages.
        stop: strings that end the reply.
        logprobs: also return the log-probability of every token of the reply.
        scored: a text whose log-probabilities after the prompt are asked for, instead of a reply.
        extra: further fields of the request's body; a None takes a field out.
        draw: tells repetitions of the same request apart; it is not sent.
    """

    model: str
    max_tokens: int
    temperature: float
    top_p: float
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    scored: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    draw: int = 0

    def key_fields(self) -> dict[str, Any]:
        """Return what decides the reply; what is not asked for is left out, so that new fields keep old keys."""
        fields: dict[str, Any] = {"model": self.model}
        if self.messages:
            fields["messages"] = list(self.messages)
        else:
            fields["prompt"] = self.prompt
        if self.scored is not None:  # sampling has no part in it
            fields["scored"] = self.scored
        else:
            fields |= {"max_tokens": self.max_tokens, "temperature": self.temperature, "top_p": self.top_p}
            if self.seed is not None:
                fields["seed"] = self.seed
        if self.logprobs:
            fields["logprobs"] = True
        if self.stop:
            fields["stop"] = list(self.stop)
        if self.extra:
            fields["extra_body"] = dict(self.extra)
        if self.draw:
            fields["draw"] = self.draw
        return fields

    @property
    def texts(self) -> list[str]:
        """All text that the model reads."""
        read = [message["content"] for message in self.messages] or [self.prompt]
        return read if self.scored is None else [*read, self.scored]

    @property
    def most_tokens(self) -> int:
        """The longest reply, in tokens."""
        return self.max_tokens if self.scored is None else 1

    @property
    def repeatable(self) -> bool:
        """Whether asking again is meant to return the same: greedy, or of a stated seed."""
        return self.temperature == 0 or self.seed is not None


def merged(body: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return `body` with the fields of `extra`; those that are None are taken out."""
    return {key: value for key, value in {**body, **extra}.items() if value is not None}
