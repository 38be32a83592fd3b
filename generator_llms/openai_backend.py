"""The protocol of OpenAI, which vLLM and most hosts speak: chats, plain completions, vLLM's scores of given text."""

from __future__ import annotations

import asyncio
from typing import Any

from generator_llms.backend import Wire
from generator_llms.config import GeneratorConfig
from generator_llms.replies import (
    Completion,
    ServedModel,
    decode_body,
    read_completion,
    read_models,
    read_scored,
    read_tokens,
)
from generator_llms.request import Request, merged
from generator_llms.retry import Rejected
from verl.errors import ConfigError


class OpenAIBackend:
    """One endpoint; azure's deployments answer under other names than theirs and cannot be listed."""

    def __init__(self, wire: Wire, config: GeneratorConfig) -> None:
        self.where = wire.where
        self._wire = wire
        self._azure = config.backend == "azure"
        self._check_model = config.check_model and not self._azure
        self._max_chars = config.max_reply_chars

    async def complete(self, request: Request) -> Completion:
        """See `Backend`."""
        if request.scored is not None:
            return await self._score(request, request.scored)
        path = "/chat/completions" if request.messages else "/completions"
        payload = decode_body(await self._wire.post(path, merged(_body(request), request.extra)))
        return read_completion(payload, self._expected(request), self._max_chars, request.logprobs)

    async def models(self) -> list[ServedModel] | None:
        """See `Backend`."""
        return None if self._azure else read_models(decode_body(await self._wire.get("/models")))

    async def aclose(self) -> None:
        """See `Backend`."""
        await self._wire.aclose()

    def _expected(self, request: Request) -> str | None:
        return request.model if self._check_model else None

    async def _score(self, request: Request, text: str) -> Completion:
        """Ask vLLM for the log-probabilities of `text` after the prompt; those of its own tokens and no others.

        The text is tokenised on its own and its ids follow the prompt's, so that the border is exact: tokenising both
        together could merge characters across it.
        """
        if self._azure:
            raise ConfigError("log-probabilities of given texts need vLLM; backend=azure has none, use backend=openai")
        prompt, scored = await asyncio.gather(
            self._tokens(_tokenize_body(request)),
            self._tokens({"model": request.model, "prompt": text, "add_special_tokens": False}),
        )
        if not prompt or not scored:
            raise Rejected(f"{text!r} after this prompt makes {len(scored)} tokens; nothing can be scored")
        body = {"model": request.model, "prompt": prompt + scored, "max_tokens": 1, "temperature": 0.0}
        payload = decode_body(await self._wire.post("/completions", {**body, "prompt_logprobs": 0}))
        return read_scored(payload, self._expected(request), prompt + scored, len(scored))

    async def _tokens(self, body: dict[str, Any]) -> list[int]:
        # It lies beside the versioned API.
        root = self.where.rstrip("/").removesuffix("/v1")
        return read_tokens(decode_body(await self._wire.post(f"{root}/tokenize", body)))


def _body(request: Request) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": request.model,
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "stop": list(request.stop) or None,
    }
    if request.messages:
        return {**body, "messages": list(request.messages), "logprobs": request.logprobs or None}
    # Plain completions take the number of alternatives, and zero of them still gives the chosen token's.
    return {**body, "prompt": request.prompt, "logprobs": 0 if request.logprobs else None}


def _tokenize_body(request: Request) -> dict[str, Any]:
    body: dict[str, Any] = {"model": request.model}
    if not request.messages:
        return {**body, "prompt": request.prompt}
    kwargs = request.extra.get("chat_template_kwargs")
    return merged(body, {"messages": list(request.messages), "chat_template_kwargs": kwargs})
