"""Ask a service on the internet: at its rate, with bounded retries, and without ever showing a key."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import re
import time
import urllib.request
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import quote, urlsplit

import httpx

from verl.errors import ConfigError, RetrieverError
from verl.retrieval.rate_limit import SlidingWindow, Turn
from verl.retrieval.web_formats import Call, Credential, error_reason, shortened

logger = logging.getLogger(__name__)

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_KEY = re.compile(r"[A-Za-z0-9._:~-]{8,}")
_RATE_REASONS = ("rateLimitExceeded", "userRateLimitExceeded")


@dataclass(frozen=True, slots=True)
class FetchConfig:
    """How a service is asked.

    Attributes:
        rate: requests in any second, retries included; a whole number of them or an even spacing (see
            `verl.retrieval.rate_limit`). It is one process's rate: with several server processes, divide.
        concurrency: requests on their way at the same time; when None, as many as the rate lets go within the timeout,
            so that the rate alone keeps a query waiting.
        timeout_s: for one attempt, from connecting to the last byte.
        attempts: most requests for one answer.
        backoff_s: mean wait before the second attempt; it doubles with every further one.
        max_wait_s: most that is waited between two attempts. A service that asks for more (Retry-After) is not asked
            again before that time: until then every query gets an error at once.
        max_body_bytes: longest answer that is read.
    """

    rate: float = 5.0
    concurrency: int | None = None
    timeout_s: float = 20.0
    attempts: int = 4
    backoff_s: float = 0.5
    max_wait_s: float = 30.0
    max_body_bytes: int = 8 * 1024 * 1024

    def __post_init__(self) -> None:
        for name in ("concurrency", "attempts", "max_body_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"web {name}={value}; expected at least 1")
        for name in ("rate", "timeout_s"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(f"web {name}={getattr(self, name)}; expected a positive number")
        for name in ("backoff_s", "max_wait_s"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"web {name}={getattr(self, name)}; expected 0 or more seconds")

    @property
    def most_at_once(self) -> int:
        """Requests that may be on their way at the same time."""
        return self.concurrency or math.ceil(self.rate * self.timeout_s)


class Secrets:
    """The credentials of one service. They show in nothing that is made of this object but the requests themselves."""

    def __init__(self, credentials: Sequence[Credential], environ: Mapping[str, str]) -> None:
        """Read them from the environment.

        Raises:
            ConfigError: one is not set, or cannot be a key; its value is not shown.
        """
        self.variables = tuple(credential.variable for credential in credentials)
        self._values = {credential: _value(credential.variable, environ) for credential in credentials}
        # As they are, and as they stand in a URL; they hold nothing that JSON would escape.
        forms = {form for value in self._values.values() for form in (value, quote(value, safe=""))}
        self._shown = re.compile("|".join(map(re.escape, sorted(forms, reverse=True))) or r"(?!)", re.IGNORECASE)

    def __repr__(self) -> str:
        return f"Secrets({', '.join(self.variables)})"

    def removed_from(self, text: str) -> str:
        """Return a text from outside with every credential that it repeats blotted out."""
        return self._shown.sub("[key]", text)

    def placed(self, place: str) -> dict[str, str]:
        """Return name and value of those that go into the `query` or are a `header`."""
        return {item.name: value for item, value in self._values.items() if item.place == place}


class Fetcher:
    """Asks one service; belongs to one event loop.

    Attributes:
        requests: sent so far, retries included.
        retries: sent because the attempt before failed.
    """

    def __init__(
        self,
        base_url: str,
        secrets: Secrets,
        config: FetchConfig,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Prepare a fetcher; nothing is connected yet.

        Raises:
            ConfigError: `base_url` is no address to which keys may be sent.
        """
        check_base_url(base_url, keyless=not secrets.variables)
        self.requests = 0
        self.retries = 0
        self._base_url = base_url.rstrip("/")
        self._secrets = secrets
        self._config = config
        self._clock = clock
        self._sleep = sleep
        self._limiter = SlidingWindow.per_second(config.rate, clock, sleep)
        self._slots = asyncio.Semaphore(config.most_at_once)
        self._blocked_until = -math.inf
        self._jitter = random.Random()  # only spreads retries in time; no result depends on it
        self._http = httpx.AsyncClient(
            transport=_KeyedTransport(_network(base_url, config), secrets), timeout=config.timeout_s
        )

    async def fetch(self, call: Call) -> str:
        """Return the text of the answer with status 200, rid of credentials.

        Raises:
            RetrieverError: no such answer within the attempts, or one that asking again cannot change.
        """
        attempt = 1
        while True:
            try:
                return await self._attempt(call)
            except _Unavailable as cause:
                if attempt == self._config.attempts or cause.retry_after_s > self._config.max_wait_s:
                    raise RetrieverError(f"{cause} ({attempt} attempts)") from None
                logger.warning("%s: %s; attempt %d follows", urlsplit(self._base_url).hostname, cause, attempt + 1)
                await self._sleep(self._wait_s(attempt))
                attempt += 1
                self.retries += 1

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    def _wait_s(self, attempt: int) -> float:
        mean = min(self._config.backoff_s * 2 ** min(attempt - 1, 30), self._config.max_wait_s)
        return min(mean * self._jitter.uniform(0.5, 1.5), self._config.max_wait_s)

    async def _attempt(self, call: Call) -> str:
        self._check_blocked()
        async with self._slots, self._limiter.turn() as turn:
            self._check_blocked()
            self.requests += 1
            status, headers, body = await self._send(call, turn)
        try:
            text = self._secrets.removed_from(body.decode("utf-8"))
        except UnicodeDecodeError as error:
            text = ""
            if status == 200:
                raise RetrieverError(f"the answer is not UTF-8 at byte {error.start}") from None
        if status != 200:
            raise self._fault(status, headers, text)
        return text

    async def _send(self, call: Call, turn: Turn) -> tuple[int, httpx.Headers, bytes]:
        async def trace(event: str, _: Mapping[str, object]) -> None:
            if event.endswith("send_request_body.complete"):
                turn.sent()

        method = "GET" if call.body is None else "POST"
        request = self._http.build_request(
            method, self._base_url + call.path, params=call.query, json=call.body, extensions={"trace": trace}
        )
        try:
            # httpx bounds each read; an answer that drips would come through that for ever.
            async with asyncio.timeout(self._config.timeout_s):
                response = await self._http.send(request, stream=True)
                try:
                    body = await self._read(response)
                finally:
                    await response.aclose()
        except TimeoutError:
            raise _Unavailable(f"no answer within {self._config.timeout_s:g} s") from None
        except httpx.RequestError as error:
            reason = self._secrets.removed_from(str(error))
            raise _Unavailable(f"{type(error).__name__}: {reason}".rstrip(": ")) from None
        return response.status_code, response.headers, body

    async def _read(self, response: httpx.Response) -> bytes:
        limit, size = self._config.max_body_bytes, 0
        chunks: list[bytes] = []
        async for chunk in response.aiter_bytes():
            size += len(chunk)
            if size > limit:
                raise RetrieverError(f"the answer has more than {limit} bytes")
            chunks.append(chunk)
        return b"".join(chunks)

    def _fault(self, status: int, headers: httpx.Headers, text: str) -> Exception:
        """Return what an answer with another status than 200 means."""
        answer = _json(text)
        message = f"status {status}: {error_reason(answer) or shortened(text) or 'no reason given'}"
        rate_limited = status == 429 or (status == 403 and _refused_for_its_rate(answer))
        if rate_limited or status in (408, 425) or status >= 500:
            retry_after_s = _retry_after_s(headers.get("Retry-After", ""))
            self._hold(retry_after_s)
            return _Unavailable(message, retry_after_s)
        if status in (401, 403):
            return RetrieverError(f"{message}; check {' and '.join(self._secrets.variables) or 'the service'}")
        return RetrieverError(message)

    def _hold(self, seconds: float) -> None:
        """Keep every request back for as long as the service asked one of them to wait."""
        if seconds > self._config.max_wait_s:
            self._blocked_until = max(self._blocked_until, self._clock() + seconds)
        elif seconds > 0:
            self._limiter.hold(seconds)

    def _check_blocked(self) -> None:
        left_s = self._blocked_until - self._clock()
        if left_s > 0:
            raise RetrieverError(f"the service asked to be left alone for {left_s:.0f} s more; ask again after that")


class _Unavailable(Exception):
    """The service did not answer or could not; asking again may help."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class _KeyedTransport(httpx.AsyncBaseTransport):
    """Adds the keys below everything that logs or reports a request."""

    def __init__(self, inner: httpx.AsyncBaseTransport, secrets: Secrets) -> None:
        self._inner = inner
        self._secrets = secrets

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url.copy_merge_params(self._secrets.placed("query"))
        headers = [*request.headers.multi_items(), *self._secrets.placed("header").items()]
        keyed = httpx.Request(
            request.method, url, headers=headers, stream=request.stream, extensions=request.extensions
        )
        return await self._inner.handle_async_request(keyed)

    async def aclose(self) -> None:
        await self._inner.aclose()


def check_base_url(url: str, keyless: bool = False) -> None:
    """Refuse a base URL to which no key should be sent.

    Args:
        keyless: no key is; plain http may then leave this machine.

    Raises:
        ConfigError: it is not https (or http on this machine), or has more than host, port and path.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"web base_url={url!r}: {error}; expected https://HOST") from error
    if not host or parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError("web base_url is no plain address; expected https://HOST with no user, query or fragment")
    if parts.scheme != "https" and not (parts.scheme == "http" and (keyless or host in _LOOPBACK)):
        raise ConfigError(
            f"web base_url={url!r}; expected https (http only on this machine), because keys travel there"
        )


def _value(variable: str, environ: Mapping[str, str]) -> str:
    value = environ.get(variable, "").strip()
    if not value:
        raise ConfigError(f"environment variable {variable} is not set; set it to your key of the service")
    if not _KEY.fullmatch(value):
        raise ConfigError(f"{variable} holds no key; expected 8 or more letters, digits or . _ : ~ -")
    return value


def _network(base_url: str, config: FetchConfig) -> httpx.AsyncBaseTransport:
    """Return the way to the service, through the proxy that the environment names, if any."""
    parts = urlsplit(base_url)
    proxy = None
    if parts.hostname not in _LOOPBACK and not urllib.request.proxy_bypass(parts.hostname or ""):
        proxies = urllib.request.getproxies()
        proxy = proxies.get(parts.scheme) or proxies.get("all")
    limits = httpx.Limits(max_connections=config.most_at_once)
    try:
        return httpx.AsyncHTTPTransport(proxy=proxy, limits=limits)
    except (ValueError, ImportError) as error:  # an address that is none, or a kind of proxy that needs a package
        raise ConfigError("the environment's proxy for the web cannot be used; expected http://HOST:PORT") from error


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _refused_for_its_rate(answer: object) -> bool:
    """Whether a 403 is Google's way to say 429."""
    error = answer.get("error") if isinstance(answer, Mapping) else None
    errors = error.get("errors") if isinstance(error, Mapping) else None
    reasons = [item.get("reason") for item in errors if isinstance(item, Mapping)] if isinstance(errors, list) else []
    return any(reason in _RATE_REASONS for reason in reasons)


def _retry_after_s(value: str) -> float:
    """Read a Retry-After header: seconds or a date; 0 where it is neither."""
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
