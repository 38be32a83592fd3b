"""What a frozen generator is asked with; every default stands here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

PromptName = Literal["context", "zero_shot", "cot"]


@dataclass(frozen=True, slots=True)
class GeneratorConfig:
    """One OpenAI-compatible endpoint.

    Attributes:
        base_url: up to and including the version, for example `http://127.0.0.1:8000/v1`.
        model: name to ask for; None takes the first one that the endpoint serves.
        check_model: compare `model` and its context length with what the endpoint serves before the first question;
            switch it off for endpoints without `/models`.
        model_identity: tells apart models of the same name in the cache, for example a checksum of the weights.
        api_key_env: name of the environment variable that holds the key; it may be unset for a local endpoint.
        prompt: how `answer` asks: from the documents, without them, or without them and step by step.
        max_tokens: bound of every reply.
        max_prompt_tokens: bound of every prompt of `answer`; documents are left out from the last one until it holds.
        tokenizer: folder of the model's tokenizer, to count prompt tokens exactly; None estimates them generously.
        extra_body: further fields of the request, for example `{"chat_template_kwargs": {"enable_thinking": false}}`.
        concurrency: requests in flight.
        timeout_s: seconds that one request may take in all.
        retry_window_s: seconds after the first failure during which an endpoint that is away, busy or broken is asked
            again; long enough to restart it.
        malformed_retries: how often a reply that cannot be used is asked for again.
        max_reply_chars: a longer reply cannot be used.
        cache_path: sqlite file that keeps the replies, shared by any number of processes; None keeps nothing.
    """

    base_url: str = "http://127.0.0.1:8000/v1"
    model: str | None = None
    check_model: bool = True
    model_identity: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    prompt: PromptName = "context"
    max_tokens: int = 512
    max_prompt_tokens: int = 7000
    tokenizer: Path | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = 0
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 32
    timeout_s: float = 60.0
    retry_window_s: float = 120.0
    malformed_retries: int = 2
    max_reply_chars: int = 50_000
    cache_path: Path | None = None

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url={self.base_url!r}; expected http://HOST:PORT/v1 or https://...")
        parts = urlsplit(self.base_url)
        if parts.username or parts.password:  # not shown: the address stands in logs, reports and error messages
            raise ValueError("base_url holds a user or password; put the key into the variable that api_key_env names")
        try:
            _ = parts.port
        except ValueError as cause:
            raise ValueError(f"base_url={self.base_url!r}: {cause}; expected http://HOST:PORT/v1") from cause
        for name in ("max_tokens", "max_prompt_tokens", "concurrency", "max_reply_chars"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            raise ValueError(f"timeout_s={self.timeout_s}; expected a positive number of seconds")
        for name in ("retry_window_s", "malformed_retries", "temperature"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}; expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}; expected a number above 0 and at most 1")
