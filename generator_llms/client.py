"""The frozen generator as an async client of any OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import openai

from generator_llms import prompts
from generator_llms.cache import ReplyCache, cache_key
from generator_llms.config import GeneratorConfig
from generator_llms.prompts import CountTokens, Message
from generator_llms.replies import Completion, ServedModel, decode_body, read_completion, read_models, shorten
from generator_llms.retry import Malformed, Rejected, RetryPolicy, Unavailable, parse_retry_after
from verl.errors import ConfigError, GeneratorError
from verl.types import Document, Question

logger = logging.getLogger(__name__)

_LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1", "0.0.0.0")
_RETRIED_STATUS = (408, 409, 425, 429)


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer from documents.

    Attributes:
        answer: the final answer, without quoted evidence.
        raw: the whole reply.
        documents_used, documents_dropped: how many of the given documents the prompt showed, and how many it could not.
        truncated: the reply hit `max_tokens`.
    """

    answer: str
    raw: str
    documents_used: int
    documents_dropped: int
    truncated: bool = False


@dataclass(slots=True)
class GeneratorStats:
    """What a client did so far; tokens are those of requests that were sent, as the endpoint counted them."""

    requests: int = 0
    cached: int = 0
    retries: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    documents_dropped: int = 0
    truncated: int = 0


class GeneratorClient:
    """Asks a frozen generator; safe for any number of concurrent callers within one event loop.

    Use as an async context manager, or call `aclose`.

    Args:
        count_tokens: counts prompt tokens; None takes `config.tokenizer`, or an estimate.
        environment: where the API key is looked up.

    Raises:
        ConfigError: a remote endpoint without a key, an unusable cache or tokenizer.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        count_tokens: CountTokens | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self.config = config
        self.stats = GeneratorStats()
        self._count_tokens = count_tokens or _token_counter(config)
        self._sdk = _sdk_client(config, environment)
        self._cache = ReplyCache(config.cache_path) if config.cache_path else None
        self._retry = RetryPolicy(config.retry_window_s, config.malformed_retries)
        self._slots = asyncio.Semaphore(config.concurrency)
        self._finding: asyncio.Task[str] | None = None

    async def __aenter__(self) -> GeneratorClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close connections and cache."""
        if self._finding is not None:
            self._finding.cancel()
        await self._sdk.close()
        if self._cache is not None:
            self._cache.close()

    async def ready(self) -> str:
        """Return the model that will answer, after checking once that the endpoint serves it with enough context.

        Raises:
            GeneratorError: the endpoint is away, or serves another model or a shorter context than configured.
        """
        if self._finding is None:
            self._finding = asyncio.create_task(self._find_model())
            self._finding.add_done_callback(self._forget_failure)
        # Shielded: all callers share one check, and one of them giving up must not end it for the others.
        return await asyncio.shield(self._finding)

    async def complete(
        self, messages: Sequence[Message], *, max_tokens: int | None = None, logprobs: bool = False
    ) -> Completion:
        """Return the reply to a conversation, from the cache if it is there. Failures are never cached.

        Args:
            max_tokens: bound of this reply; None takes the configured one.
            logprobs: also return the log-probability of every token of the reply.

        Raises:
            GeneratorError: no usable reply within the configured retries.
        """
        try:
            return await self._complete(messages, max_tokens or self.config.max_tokens, logprobs)
        except GeneratorError:
            self.stats.failures += 1
            raise

    async def _complete(self, messages: Sequence[Message], max_tokens: int, logprobs: bool) -> Completion:
        model = self.config.model or await self.ready()
        request = self._request(model, messages, max_tokens, logprobs)
        if self._cache is None:
            return await self._fetch(request)
        key = cache_key({**request, "identity": self.config.model_identity})
        stored = self._cache.get(key)
        if stored is not None:
            self.stats.cached += 1
            return Completion.from_json(stored)
        completion = await self._fetch(request)
        await asyncio.to_thread(self._cache.put, key, model, completion.to_json())
        return completion

    async def answer(self, question: Question, documents: Sequence[Document]) -> Answered:
        """Ask `question` with the configured prompt, showing as many of the first documents as fit.

        Raises:
            GeneratorError: no usable reply, or the question alone is longer than `max_prompt_tokens`.
        """
        shown = self._fitted(question, documents)
        completion = await self.complete(prompts.build(self.config.prompt, question, shown))
        truncated = completion.finish == "length"
        self.stats.truncated += truncated
        return Answered(
            answer=prompts.final_answer(completion.text),
            raw=completion.text,
            documents_used=len(shown),
            documents_dropped=len(documents) - len(shown) if self.config.prompt == "context" else 0,
            truncated=truncated,
        )

    def _fitted(self, question: Question, documents: Sequence[Document]) -> tuple[Document, ...]:
        if self.config.prompt != "context":
            return ()
        bound = self.config.max_prompt_tokens
        overhead = prompts.prompt_overhead(question, self._count_tokens)
        if overhead > bound:
            raise GeneratorError(
                f"question {question.id!r} makes a prompt of {overhead} tokens without any document; expected at most "
                f"max_prompt_tokens={bound}, raise it or shorten the question"
            )
        shown = prompts.fit(question, documents, bound, self._count_tokens)
        dropped = len(documents) - len(shown)
        if dropped:
            self.stats.documents_dropped += dropped
            logger.info(
                "question %r: the last %d of %d documents do not fit into max_prompt_tokens=%d",
                question.id,
                dropped,
                len(documents),
                bound,
            )
        return shown

    def _request(self, model: str, messages: Sequence[Message], max_tokens: int, logprobs: bool) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": self.config.temperature,
            "top_p": self.config.top_p,
        }
        if self.config.seed is not None:
            request["seed"] = self.config.seed
        if logprobs:
            request["logprobs"] = True
        if self.config.extra_body:
            request["extra_body"] = dict(self.config.extra_body)
        return request

    async def _fetch(self, request: Mapping[str, Any]) -> Completion:
        await self.ready()
        completion = await self._retry.run(lambda: self._ask(request), self._where(), self._count_retry)
        self.stats.prompt_tokens += completion.prompt_tokens
        self.stats.completion_tokens += completion.completion_tokens
        return completion

    async def _ask(self, request: Mapping[str, Any]) -> Completion:
        self.stats.requests += 1
        body = await self._send(lambda: self._sdk.chat.completions.with_raw_response.create(**request))
        expected = request["model"] if self.config.check_model else None
        return read_completion(decode_body(body), expected, self.config.max_reply_chars, "logprobs" in request)

    async def _find_model(self) -> str:
        config = self.config
        if not config.check_model:
            if config.model is None:
                raise GeneratorError("check_model=false and model=null; name the model that the endpoint serves")
            return config.model
        models = await self._retry.run(self._list_models, self._where(), self._count_retry)
        names = [model.name for model in models]
        if config.model is not None and config.model not in names:
            raise GeneratorError(
                f"{self._where()} serves {', '.join(names)}, expected {config.model!r}; start the generator with it, "
                "or set model to what is served"
            )
        served = models[names.index(config.model) if config.model is not None else 0]
        needed = config.max_prompt_tokens + config.max_tokens
        if served.max_model_len is not None and needed > served.max_model_len:
            raise GeneratorError(
                f"{served.name} has a context of {served.max_model_len} tokens, but max_prompt_tokens + max_tokens = "
                f"{config.max_prompt_tokens} + {config.max_tokens} = {needed}; lower them"
            )
        return served.name

    async def _list_models(self) -> list[ServedModel]:
        return read_models(decode_body(await self._send(self._sdk.models.with_raw_response.list)))

    async def _send(self, call: Callable[[], Awaitable[Any]]) -> bytes:
        """Await one SDK call within a slot and the timeout, and sort its errors into those worth a retry and others.

        The slot is held for the request alone, not for the pauses between retries: questions that wait for a generator
        to come back all wait at the same time.
        """
        seconds = self.config.timeout_s
        try:
            async with self._slots, asyncio.timeout(seconds):
                return (await call()).http_response.content
        except TimeoutError as cause:
            raise Unavailable(f"no reply within timeout_s={seconds:g}") from cause
        except openai.APIStatusError as cause:
            raise _sorted_status(cause) from cause
        except openai.APIConnectionError as cause:
            raise Unavailable(f"{cause} ({cause.__cause__ or 'no detail'})") from cause
        except openai.OpenAIError as cause:
            raise Malformed(shorten(str(cause))) from cause

    def _forget_failure(self, finding: asyncio.Task[str]) -> None:
        if finding.cancelled() or finding.exception() is not None:
            self._finding = None

    def _count_retry(self) -> None:
        if not self.stats.retries:
            logger.warning(
                "%s gave no usable reply; asking again for up to %g s (later retries are only counted)",
                self._where(),
                self.config.retry_window_s,
            )
        self.stats.retries += 1

    def _where(self) -> str:
        return f"generator at {self.config.base_url}"


def _sorted_status(error: openai.APIStatusError) -> Unavailable | Rejected:
    text = f"status {error.status_code}: {shorten(error.message)}"
    if error.status_code in _RETRIED_STATUS or error.status_code >= 500:
        return Unavailable(text, parse_retry_after(error.response.headers.get("retry-after")))
    return Rejected(f"{text}; correct the configuration or the request")


def _token_counter(config: GeneratorConfig) -> CountTokens:
    return prompts.load_token_counter(config.tokenizer) if config.tokenizer else prompts.estimate_tokens


def _sdk_client(config: GeneratorConfig, environment: Mapping[str, str]) -> openai.AsyncOpenAI:
    local = urlsplit(config.base_url).hostname in _LOCAL_HOSTS
    key = environment.get(config.api_key_env) or ("EMPTY" if local else "")
    if not key:
        raise ConfigError(
            f"{config.base_url} is not local and the environment variable {config.api_key_env} is not set; put the key "
            "there, or name another variable in api_key_env"
        )
    # The SDK's transport logs every request at INFO, thousands of lines per training step.
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    return openai.AsyncOpenAI(
        base_url=config.base_url,
        api_key=key,
        max_retries=0,  # ours are bounded by time, so that a generator can be restarted under a running job
        timeout=None,  # ours bounds the request as a whole, the SDK's each of its reads
        # A proxy from the environment could not reach this machine's own ports.
        http_client=openai.DefaultAsyncHttpxClient(trust_env=not local),
    )
