"""What a frozen generator is asked with; every default stands here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

Backend = Literal["openai", "azure", "anthropic", "bedrock"]
Style = Literal["chat", "completion"]
PromptName = Literal["context", "zero_shot", "cot", "strict_span", "choice"]
CacheMode = Literal["use", "replay", "refresh", "off"]

LOCAL_URL = "http://127.0.0.1:8000/v1"
NO_SAMPLING_SINCE = "2026-10-21"
"""First version of the Messages API that refuses temperature and top_p, whatever their values."""


@dataclass(frozen=True, slots=True)
class GeneratorConfig:
    """A frozen generator: one model, served by one endpoint or by several alike.

    Attributes:
        backend: whose protocol the endpoint speaks: `openai` is anything OpenAI-compatible (vLLM, Together, DeepInfra,
            DashScope, ...), `azure` takes the name of a deployment as `model`, `anthropic` and `bedrock` are Claude.
        base_url: up to and including the version, for example `http://127.0.0.1:8000/v1`; for azure
            `https://RESOURCE.openai.azure.com`. Left as it is, anthropic and bedrock use the vendor's own address.
        base_urls: further endpoints that serve the same model; a request goes to the one with the fewest in flight.
        api_version: azure's `api-version`, required there; for anthropic and bedrock the version of the Messages API,
            null being the last one that takes a temperature.
        aws_region: of bedrock; null reads AWS_REGION.
        style: `completion` sends plain text to `/completions`, for base models without a chat template.
        model: name to ask for; None takes the first one that the endpoint serves (openai and anthropic only).
        check_model: compare `model` and its context length with what the endpoint serves before the first question;
            switch it off for endpoints without `/models`. Azure and bedrock cannot be asked and are never checked.
        model_identity: tells apart models of the same name in the cache, for example a checksum of the weights.
        api_key_env: name of the environment variable that holds the key; empty is the usual one of the backend
            (OPENAI_API_KEY, AZURE_OPENAI_API_KEY, ANTHROPIC_API_KEY, AWS_BEARER_TOKEN_BEDROCK). It may be unset for a
            local endpoint, and for bedrock, whose requests are then signed with the AWS credentials that boto3 finds.
        prompt: how `answer` asks: from the documents (`context`, `strict_span`, `choice`) or without them (`zero_shot`,
            step by step `cot`); see `generator_llms.prompts`.
        shows_question: as a judge, whether it is shown the question too; the published judge is not.
        max_tokens: bound of every reply.
        max_prompt_tokens: bound of every prompt of `answer`; documents are left out from the last one until it holds.
        tokenizer: folder of the model's tokenizer, to count prompt tokens exactly; None estimates them generously.
        sample_temperature: of `samples`; all other requests use `temperature`.
        seed: sent with every request (Claude takes none); None sends none.
        extra_body: further fields of the request, for example `{"chat_template_kwargs": {"enable_thinking": false}}`;
            a null takes out a field of ours that an endpoint refuses, for example `{"temperature": null}`.
        concurrency: requests in flight, for each endpoint.
        requests_per_minute, tokens_per_minute: bounds over any 60 seconds, of this client alone; None is no bound.
            Tokens are prompt and reply, reserved at their most and corrected when the reply comes.
        price_per_million_prompt, price_per_million_completion: of a million tokens, in any currency; for `stats.spend`.
        max_spend: no request is sent that could take `stats.spend` of this client beyond it.
        timeout_s: seconds that one request may take in all.
        retry_window_s: seconds after the first failure during which an endpoint that is away, busy or broken is asked
            again; long enough to restart it.
        malformed_retries: how often a reply that cannot be used is asked for again.
        max_reply_chars: a longer reply cannot be used.
        cache_path: sqlite file that keeps the replies, shared by any number of processes; None keeps nothing.
        cache_mode: `use` asks for what is not there and keeps it; `replay` answers from the cache alone and opens no
            connection; `refresh` asks anew and overwrites; `off` ignores `cache_path`.
        cache_max_bytes: size from which on the replies that were not used for longest are removed; None is no bound.
    """

    base_url: str = LOCAL_URL
    backend: Backend = "openai"
    base_urls: tuple[str, ...] = ()
    api_version: str | None = None
    aws_region: str | None = None
    style: Style = "chat"
    model: str | None = None
    check_model: bool = True
    model_identity: str = ""
    api_key_env: str = ""
    prompt: PromptName = "context"
    shows_question: bool = True
    max_tokens: int = 512
    max_prompt_tokens: int = 7000
    tokenizer: Path | None = None
    temperature: float = 0.0
    sample_temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = 0
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 32
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    price_per_million_prompt: float = 0.0
    price_per_million_completion: float = 0.0
    max_spend: float | None = None
    timeout_s: float = 60.0
    retry_window_s: float = 120.0
    malformed_retries: int = 2
    max_reply_chars: int = 50_000
    cache_path: Path | None = None
    cache_mode: CacheMode = "use"
    cache_max_bytes: int | None = None

    def __post_init__(self) -> None:
        _check_url("base_url", self.base_url)
        for url in self.base_urls:
            _check_url("base_urls", url)
        if len(set(self.urls)) < len(self.urls):
            raise ValueError(f"base_url and base_urls name an endpoint twice: {', '.join(self.urls)}; name each once")
        self._check_numbers()
        self._check_backend()
        self._check_limits()
        if self.cache_mode in ("replay", "refresh") and self.cache_path is None:
            raise ValueError(f"cache_mode={self.cache_mode} without cache_path; name the file that holds the replies")

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses of all endpoints."""
        return (self.base_url, *self.base_urls)

    @property
    def sends_sampling(self) -> bool:
        """Whether the endpoint takes a temperature at all."""
        claude = self.backend in ("anthropic", "bedrock")
        return not (claude and self.api_version is not None and self.api_version >= NO_SAMPLING_SINCE)

    def _check_numbers(self) -> None:
        for name in ("max_tokens", "max_prompt_tokens", "concurrency", "max_reply_chars"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            raise ValueError(f"timeout_s={self.timeout_s}; expected a positive number of seconds")
        for name in ("retry_window_s", "malformed_retries", "temperature", "sample_temperature"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}; expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}; expected a number above 0 and at most 1")

    def _check_backend(self) -> None:
        if self.backend == "azure" and (self.base_url == LOCAL_URL or not self.api_version):
            raise ValueError(
                "backend=azure needs base_url=https://RESOURCE.openai.azure.com and api_version, for example 2024-10-21"
            )
        if self.backend in ("azure", "bedrock") and self.model is None:
            raise ValueError(f"backend={self.backend} cannot be asked what it serves; set model")
        if self.backend in ("anthropic", "bedrock") and self.style == "completion":
            raise ValueError(f"style=completion: {self.backend} has no plain completions; use style=chat")
        if not self.sends_sampling and not self.temperature == self.top_p == 1:
            raise ValueError(
                f"temperature={self.temperature:g}, top_p={self.top_p:g}: api_version={self.api_version} takes "
                "neither; set both to 1, the model's own sampling, or api_version to null"
            )

    def _check_limits(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute", "cache_max_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}; expected at least 1, or null for no bound")
        prices = (self.price_per_million_prompt, self.price_per_million_completion)
        if not all(math.isfinite(price) and price >= 0 for price in prices):
            raise ValueError(f"price_per_million_prompt/completion={prices}; expected 0 or more")
        if self.max_spend is not None and not (self.max_spend > 0 and any(prices)):
            raise ValueError(
                f"max_spend={self.max_spend}; expected more than 0, together with price_per_million_prompt and "
                "price_per_million_completion"
            )


def _check_url(name: str, url: str) -> None:
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{name}={url!r}; expected http://HOST:PORT/v1 or https://...")
    parts = urlsplit(url)
    if parts.username or parts.password:  # not shown: the address stands in logs, reports and error messages
        raise ValueError(f"{name} holds a user or password; put the key into the variable that api_key_env names")
    try:
        _ = parts.port
    except ValueError as cause:
        raise ValueError(f"{name}={url!r}: {cause}; expected http://HOST:PORT/v1") from cause
