"""The endpoints of a generator as a whole: which model they serve, and requests sent within all bounds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping
from typing import TypeVar

from generator_llms.backend import Backend
from generator_llms.backends import open_backends
from generator_llms.cache import ReplyCache
from generator_llms.config import GeneratorConfig
from generator_llms.limits import Budget, RateLimiter
from generator_llms.pool import Lane, Pool
from generator_llms.prompts import CountTokens
from generator_llms.replies import Completion, ServedModel
from generator_llms.request import Request
from generator_llms.retry import Malformed, Rejected, RetryPolicy, Unavailable
from generator_llms.usage import GeneratorStats
from verl.errors import GeneratorError

T = TypeVar("T")
logger = logging.getLogger(__name__)
_TEMPLATE_TOKENS = 32


class GeneratorService:
    """Sends requests: the best endpoint, within concurrency, rates and budget, again where that may help.

    Args:
        stats: counts what is done.

    Raises:
        ConfigError: a key or package is missing.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        stats: GeneratorStats,
        environment: Mapping[str, str],
        count_tokens: CountTokens,
        retry: RetryPolicy,
    ) -> None:
        self._config = config
        self._stats = stats
        self._count_tokens = count_tokens
        self._pool = Pool(open_backends(config, environment), config.concurrency)
        self._retry = retry
        self._budget = Budget(config.price_per_million_prompt, config.price_per_million_completion, config.max_spend)
        self._rates = _rate_limiter(config)
        self._where = _where(self._pool.lanes)

    async def aclose(self) -> None:
        """Close all connections."""
        for lane in self._pool.lanes:
            await lane.backend.aclose()

    async def complete(self, request: Request) -> Completion:
        """Return the reply.

        Raises:
            GeneratorError: none that is usable within the configured retries, or none within `max_spend`.
            ConfigError: the backend has no such kind of request.
        """
        completion = await self._retry.run(lambda: self._ask(request), self._where, self._count_retry)
        self._stats.prompt_tokens += completion.prompt_tokens
        self._stats.completion_tokens += completion.completion_tokens
        return completion

    async def find_model(self) -> ServedModel:
        """Return the model that all endpoints serve.

        Raises:
            GeneratorError: one is away, or serves another model or a shorter context than configured.
        """
        config = self._config
        if not config.check_model or config.backend in ("azure", "bedrock"):
            if config.model is None:
                raise GeneratorError("check_model=false and model=null; name the model that the endpoint serves")
            return ServedModel(config.model, None)
        first: ServedModel | None = None
        for lane in self._pool.lanes:
            model = await self._served(lane.backend, first.name if first else config.model)
            check_context(config, model)
            first = first or model
        assert first is not None  # there is always an endpoint
        return first

    async def _served(self, backend: Backend, wanted: str | None) -> ServedModel:
        """Return what an endpoint serves as `wanted`, or its first model."""
        where = f"generator at {backend.where}"
        models = await self._retry.run(lambda: self._bounded(backend.models()), where, self._count_retry)
        assert models  # only backends that list their models are asked
        names = [model.name for model in models]
        if wanted is not None and wanted not in names:
            raise GeneratorError(
                f"{where} serves {', '.join(names)}, expected {wanted!r}; start the generator with it, or set model to "
                "what is served (every endpoint must serve the same)"
            )
        return models[names.index(wanted) if wanted is not None else 0]

    async def _ask(self, request: Request) -> Completion:
        """Send a request once, when the rates admit it.

        A slot is held for the request alone, not for the pauses between retries: questions that wait for a generator to
        come back all wait at the same time.
        """
        prompt_tokens = self._estimate(request)
        admitted = await self._rates.admit(prompt_tokens + request.most_tokens) if self._rates else None
        taken = 0
        try:
            async with self._pool.slot() as lane:
                completion = await self._paid(lane, request, prompt_tokens)
            taken = completion.prompt_tokens + completion.completion_tokens or prompt_tokens + request.most_tokens
            return completion
        except Malformed:
            taken = prompt_tokens + request.most_tokens
            raise
        finally:
            if self._rates is not None and admitted is not None:
                self._rates.settle(admitted, taken)

    async def _paid(self, lane: Lane, request: Request, prompt_tokens: int) -> Completion:
        """Send a request to an endpoint, if the budget allows."""
        reserved = self._budget.reserve(prompt_tokens, request.most_tokens)
        booked: Completion | None = None
        try:
            booked = await self._sent(lane, request)
            return booked
        except Malformed:
            booked = Completion("")  # it was answered, so it was charged
            raise
        finally:
            self._budget.settle(reserved, booked)
            self._stats.spend = self._budget.spent

    async def _sent(self, lane: Lane, request: Request) -> Completion:
        """Send a request to an endpoint and note whether it answered."""
        self._stats.requests += 1
        try:
            completion = await self._bounded(lane.backend.complete(request))
        except Unavailable as cause:
            others = self._pool.failed(lane, cause.retry_after)
            where = f"{lane.backend.where}: " if len(self._pool.lanes) > 1 else ""
            raise Unavailable(f"{where}{cause}", None if others else cause.retry_after) from cause
        except (Malformed, Rejected):
            self._pool.answered(lane)
            raise
        self._pool.answered(lane)
        return completion

    async def _bounded(self, call: Awaitable[T]) -> T:
        seconds = self._config.timeout_s
        try:
            async with asyncio.timeout(seconds):
                return await call
        except TimeoutError as cause:
            raise Unavailable(f"no reply within timeout_s={seconds:g}") from cause

    def _estimate(self, request: Request) -> int:
        if self._rates is None and not self._config.price_per_million_prompt:
            return 0  # nobody needs to know
        return _TEMPLATE_TOKENS + sum(map(self._count_tokens, request.texts))

    def _count_retry(self) -> None:
        if not self._stats.retries:
            logger.warning(
                "%s gave no usable reply; asking again for up to %g s (later retries are only counted)",
                self._where,
                self._config.retry_window_s,
            )
        self._stats.retries += 1


def check_context(config: GeneratorConfig, model: ServedModel) -> None:
    """Check that prompt and reply fit into the model's context.

    Raises:
        GeneratorError: they do not.
    """
    needed = config.max_prompt_tokens + config.max_tokens
    if model.max_model_len is not None and needed > model.max_model_len:
        raise GeneratorError(
            f"{model.name} has a context of {model.max_model_len} tokens, but max_prompt_tokens + max_tokens = "
            f"{config.max_prompt_tokens} + {config.max_tokens} = {needed}; lower them"
        )


def endpoint_name(config: GeneratorConfig) -> str:
    """Return the name under which the cache remembers what these endpoints serve."""
    return f"{config.backend} {config.base_url} {config.model or '(first)'} {config.model_identity}".rstrip()


def replayed_model(config: GeneratorConfig, cache: ReplyCache) -> str:
    """Return the model that answered when the cache was filled, checked as a running one would be.

    Endpoints may have had another address then; without a `model` in the configuration that is no question as long as
    the cache knows one model only.

    Raises:
        GeneratorError: the cache does not say.
    """
    known = cache.all_served()
    served = known.get(endpoint_name(config))
    if served is None:
        same = {model.name: model for model in known.values() if config.model in (None, model.name)}
        served = next(iter(same.values())) if len(same) == 1 else None
    if served is None and config.model is not None:
        return config.model  # it was filled without a check, by name
    if served is None:
        names = ", ".join(sorted({model.name for model in known.values()})) or "none"
        raise GeneratorError(
            f"cache_mode=replay: {cache.path} does not say which model {config.base_url} served (known: {names}); set "
            "model to the one that filled it"
        )
    check_context(config, served)
    return served.name


def _rate_limiter(config: GeneratorConfig) -> RateLimiter | None:
    if config.requests_per_minute is None and config.tokens_per_minute is None:
        return None
    return RateLimiter(config.requests_per_minute, config.tokens_per_minute)


def _where(lanes: list[Lane]) -> str:
    more = f" (and {len(lanes) - 1} more)" if len(lanes) > 1 else ""
    return f"generator at {lanes[0].backend.where}{more}"
