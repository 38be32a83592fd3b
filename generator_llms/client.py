"""The frozen generator as an async client: prompts, cache, retries, limits and endpoints behind one interface."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from generator_llms import prompts
from generator_llms.cache import ReplyCache, cache_key
from generator_llms.config import GeneratorConfig
from generator_llms.prompts import CountTokens, Message
from generator_llms.replies import Completion, Sample
from generator_llms.request import Request
from generator_llms.retry import RetryPolicy
from generator_llms.service import GeneratorService, endpoint_name, replayed_model
from generator_llms.store import ReplyStore
from generator_llms.usage import GeneratorStats
from verl.errors import GeneratorError
from verl.types import Document, Question

logger = logging.getLogger(__name__)


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


class GeneratorClient:
    """Asks a frozen generator; safe for any number of concurrent callers within one event loop.

    Equal requests have one reply: from the cache if there is one, else from the request that is already under way
    (but for requests that are meant to differ: sampled ones without a seed, and other `draw`s).

    Use as an async context manager, or call `aclose`.

    Args:
        count_tokens: counts prompt tokens; None takes `config.tokenizer`, or an estimate.
        environment: where keys are looked up.
        retry: when a failed request is asked again; None takes the bounds of `config`.

    Raises:
        ConfigError: a remote endpoint without a key, an unusable cache or tokenizer, a package that is not installed.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        count_tokens: CountTokens | None = None,
        environment: Mapping[str, str] = os.environ,
        retry: RetryPolicy | None = None,
    ) -> None:
        self.config = config
        self.stats = GeneratorStats()
        self._count_tokens = count_tokens or _token_counter(config)
        self._service = None
        if config.cache_mode != "replay":  # which needs no key and no package, so none is looked for
            retry = retry or RetryPolicy(config.retry_window_s, config.malformed_retries)
            self._service = GeneratorService(config, self.stats, environment, self._count_tokens, retry)
        self._cache = _open_cache(config)
        self._store = ReplyStore(self._cache, config.cache_mode, self.stats)
        self._finding: asyncio.Task[str] | None = None
        self._model = config.model
        self._identity = _identity(config)

    async def __aenter__(self) -> GeneratorClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End what is under way; close connections and cache."""
        if self._finding is not None:
            self._finding.cancel()
        await self._store.aclose()
        if self._service is not None:
            await self._service.aclose()

    async def ready(self) -> str:
        """Return the model that will answer, after checking once that every endpoint serves it with enough context.

        In replay mode the cache says what it was.

        Raises:
            GeneratorError: an endpoint is away, or serves another model or a shorter context than configured.
        """
        if self._finding is None:
            self._finding = asyncio.create_task(self._find_model())
            self._finding.add_done_callback(self._forget_failure)
        # Shielded: all callers share one check, and one of them giving up must not end it for the others.
        return await asyncio.shield(self._finding)

    async def complete(
        self, messages: Sequence[Message], *, max_tokens: int | None = None, logprobs: bool = False, draw: int = 0
    ) -> Completion:
        """Return the reply to a conversation. Failures are never cached.

        Args:
            max_tokens: bound of this reply; None takes the configured one.
            logprobs: also return the log-probability of every token of the reply.
            draw: asks once more: another number is another reply, also where cache or a request under way has one.

        Raises:
            GeneratorError: no usable reply within the configured retries, or none to replay.
            ConfigError: the backend gives no log-probabilities.
        """
        return await self._reply(await self._chat(messages, max_tokens=max_tokens, logprobs=logprobs, draw=draw))

    async def complete_text(
        self, prompt: str, *, max_tokens: int | None = None, stop: Sequence[str] = (), logprobs: bool = False
    ) -> Completion:
        """Return how the model goes on from a text, without any template; arguments and errors as of `complete`.

        Args:
            stop: strings that end the reply and are not part of it.
        """
        request = await self._request(prompt=prompt, stop=tuple(stop), max_tokens=max_tokens, logprobs=logprobs)
        return await self._reply(request)

    async def answer(self, question: Question, documents: Sequence[Document], *, draw: int = 0) -> Answered:
        """Ask `question` with the configured prompt, showing as many of the first documents as fit.

        Args:
            draw: as of `complete`: asks the same once more, to see whether the generator repeats itself.

        Raises:
            GeneratorError: no usable reply, or the question alone is longer than `max_prompt_tokens`.
        """
        messages, shown = self._prompt(question, documents)
        completion = await self.complete(messages, draw=draw)
        truncated = completion.finish == "length"
        self.stats.truncated += truncated
        return Answered(
            answer=prompts.read_answer(self.config.prompt, question, completion.text),
            raw=completion.text,
            documents_used=shown,
            documents_dropped=len(documents) - shown if prompts.shows_documents(self.config.prompt) else 0,
            truncated=truncated,
        )

    async def samples(self, question: Question, documents: Sequence[Document], n: int) -> tuple[Sample, ...]:
        """Ask `question` n times at `sample_temperature`; the i-th request has the seed `seed + i`, so all repeat.

        Raises:
            GeneratorError: as `answer`; without all n there are none.
            ConfigError: the backend gives no log-probabilities.
        """
        messages, _ = self._prompt(question, documents)
        request = await self._chat(messages, logprobs=True, temperature=self.config.sample_temperature)
        seed = self.config.seed
        # Without a seed only the number of the draw tells the requests apart, for cache and sharing.
        drawn = [replace(request, draw=i) if seed is None else replace(request, seed=seed + i) for i in range(n)]
        replies = await asyncio.gather(*map(self._reply, drawn))
        return tuple(Sample(reply.text, reply.logprobs) for reply in replies)

    async def answer_logprobs(
        self, question: Question, documents: Sequence[Document], answer: str
    ) -> tuple[float, ...]:
        """Return the log-probability of each token of a given answer after the prompt that `answer` would use.

        Raises:
            GeneratorError: as `answer`; also an empty answer, and an endpoint that is not vLLM.
            ConfigError: the backend gives no log-probabilities.
        """
        if not answer.strip():
            raise GeneratorError(f"question {question.id!r}: an empty answer has no log-probabilities; give one")
        messages, _ = self._prompt(question, documents)
        scored = prompts.neutralise(answer.strip())
        plain = self.config.style == "completion"
        # After the colon of a plain prompt a word starts with its space; after a chat's template it does not.
        request = replace(await self._chat(messages), scored=f" {scored}" if plain else scored)
        return (await self._reply(request)).logprobs

    async def _reply(self, request: Request) -> Completion:
        key = cache_key({**request.key_fields(), **self._identity})
        try:
            return await self._store.reply(key, request.model, request.repeatable, lambda: self._fetch(request))
        except GeneratorError:
            self.stats.failures += 1
            raise

    async def _fetch(self, request: Request) -> Completion:
        assert self._service is not None  # the store asks nothing of a replayed run
        await self.ready()
        return await self._service.complete(request)

    async def _chat(self, messages: Sequence[Message], **settings: Any) -> Request:
        """Return the request for the reply to a conversation, in the configured style; `settings` as of `_request`."""
        if self.config.style == "completion":
            return await self._request(prompt=prompts.plain(messages), stop=prompts.PLAIN_STOPS, **settings)
        return await self._request(messages=tuple(messages), **settings)

    async def _request(
        self,
        *,
        messages: tuple[Message, ...] = (),
        prompt: str = "",
        stop: tuple[str, ...] = (),
        max_tokens: int | None = None,
        logprobs: bool = False,
        draw: int = 0,
        temperature: float | None = None,
    ) -> Request:
        config = self.config
        return Request(
            model=self._model or await self._counted_ready(),
            max_tokens=max_tokens or config.max_tokens,
            temperature=config.temperature if temperature is None else temperature,
            top_p=config.top_p,
            messages=messages,
            prompt=prompt,
            seed=config.seed,
            stop=stop,
            logprobs=logprobs,
            extra=config.extra_body,
            draw=draw,
        )

    def _prompt(self, question: Question, documents: Sequence[Document]) -> tuple[list[Message], int]:
        """Return the messages that ask `question` and how many of the documents they show."""
        name, bound = self.config.prompt, self.config.max_prompt_tokens
        room = bound - prompts.prompt_overhead(name, question, self._count_tokens)
        if room < 0:
            raise GeneratorError(
                f"question {question.id!r} makes a prompt of {bound - room} tokens without any document; expected at "
                f"most max_prompt_tokens={bound}, raise it or shorten the question"
            )
        messages, shown = prompts.build_within(name, question, documents, room, self._count_tokens)
        dropped = len(documents) - shown if prompts.shows_documents(name) else 0
        if dropped:
            self.stats.documents_dropped += dropped
            logger.info(
                "question %r: the last %d of %d documents do not fit into max_prompt_tokens=%d",
                question.id,
                dropped,
                len(documents),
                bound,
            )
        return messages, shown

    async def _counted_ready(self) -> str:
        try:
            self._model = await self.ready()
        except GeneratorError:
            self.stats.failures += 1
            raise
        return self._model

    async def _find_model(self) -> str:
        if self._service is None:
            assert self._cache is not None  # the configuration says so
            return replayed_model(self.config, self._cache)
        model = await self._service.find_model()
        await self._store.note_served(endpoint_name(self.config), model)
        return model.name

    def _forget_failure(self, finding: asyncio.Task[str]) -> None:
        if finding.cancelled() or finding.exception() is not None:
            self._finding = None


def _token_counter(config: GeneratorConfig) -> CountTokens:
    return prompts.load_token_counter(config.tokenizer) if config.tokenizer else prompts.estimate_tokens


def _open_cache(config: GeneratorConfig) -> ReplyCache | None:
    if config.cache_path is None or config.cache_mode == "off":
        return None
    return ReplyCache(config.cache_path, config.cache_max_bytes, read_only=config.cache_mode == "replay")


def _identity(config: GeneratorConfig) -> dict[str, Any]:
    """Return what decides a reply beside the request: the model behind its name."""
    identity: dict[str, Any] = {"identity": config.model_identity}
    if config.backend != "openai":  # left out where it says nothing, so that it keeps the keys of older files
        identity["backend"] = config.backend
    if config.backend == "azure":  # where the name of a deployment is anybody's choice
        identity["resources"] = list(config.urls)
    if not config.sends_sampling:
        identity["api_version"] = config.api_version
    return identity
