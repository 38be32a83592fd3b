"""The protocol of Claude, at Anthropic and on Bedrock: the Messages API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from generator_llms.backend import Wire
from generator_llms.config import GeneratorConfig
from generator_llms.replies import (
    Completion,
    ServedModel,
    check_model,
    checked_object,
    checked_text,
    count_of,
    decode_body,
    read_models,
    shorten,
)
from generator_llms.request import Request, merged
from generator_llms.retry import Malformed, Rejected
from verl.errors import ConfigError

ANTHROPIC_VERSION = "2023-06-01"
BEDROCK_VERSION = "bedrock-2023-05-31"
"""The last versions that take a temperature; what the SDK sends by itself refuses one, and 0 must mean 0 here."""

_FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
}


class AnthropicBackend:
    """One endpoint of Anthropic, or of Bedrock, where models have names of their own and cannot be listed."""

    def __init__(self, wire: Wire, config: GeneratorConfig) -> None:
        self.where = wire.where
        self._wire = wire
        self._bedrock = config.backend == "bedrock"
        self._version = config.api_version or BEDROCK_VERSION
        self._sends_sampling = config.sends_sampling
        self._check_model = config.check_model and not self._bedrock
        self._max_chars = config.max_reply_chars

    async def complete(self, request: Request) -> Completion:
        """See `Backend`."""
        if request.logprobs or request.scored is not None:
            raise ConfigError(f"{self.where}: Claude gives no log-probabilities; use a reward or backend without them")
        if not request.messages:
            raise ConfigError(f"{self.where}: Claude has no plain completions; send messages")
        body = merged(self._body(request), request.extra)
        payload = decode_body(await self._wire.post("/v1/messages", body))
        return _read_message(payload, request.model if self._check_model else None, self._max_chars)

    async def models(self) -> list[ServedModel] | None:
        """See `Backend`."""
        # A page holds 20 models unless asked for more.
        return None if self._bedrock else read_models(decode_body(await self._wire.get("/v1/models?limit=1000")))

    async def aclose(self) -> None:
        """See `Backend`."""
        await self._wire.aclose()

    def _body(self, request: Request) -> dict[str, Any]:
        system = "\n\n".join(message["content"] for message in request.messages if message["role"] == "system")
        body: dict[str, Any] = {
            "model": request.model,
            "system": system or None,
            "messages": [message for message in request.messages if message["role"] != "system"],
            "max_tokens": request.max_tokens,
            "stop_sequences": list(request.stop) or None,
            "anthropic_version": self._version if self._bedrock else None,
        }
        if self._sends_sampling:
            # Several models refuse top_p beside a temperature, so it goes only where it does something.
            body |= {"temperature": request.temperature, "top_p": request.top_p if request.top_p < 1 else None}
        return body


def _read_message(payload: Any, model: str | None, max_chars: int) -> Completion:
    """Read a reply of the Messages API.

    Args:
        model: the model that must have answered; None accepts any.

    Raises:
        Malformed: a part is missing or of the wrong kind.
        Rejected: another model answered, or it refused.
    """
    payload = checked_object(payload)
    check_model(payload.get("model"), model)
    reason = payload.get("stop_reason")
    if reason == "refusal":
        raise Rejected("the model refused; there is no answer to judge")
    blocks = payload.get("content")
    if not isinstance(blocks, list) or not all(isinstance(block, Mapping) for block in blocks):
        raise Malformed(f"the reply has no content: {shorten(repr(payload))}")
    # Other blocks, such as the model's thinking, are no part of the answer.
    texts = [checked_text(block.get("text"), max_chars, block) for block in blocks if block.get("type") == "text"]
    if not texts:
        raise Malformed(f"the reply has no text: {shorten(repr(payload))}")
    usage = payload.get("usage")
    return Completion(
        text=checked_text("".join(texts), max_chars, payload),
        prompt_tokens=count_of(usage, "input_tokens"),
        completion_tokens=count_of(usage, "output_tokens"),
        finish=_FINISH.get(reason, reason) if isinstance(reason, str) else "",
    )
