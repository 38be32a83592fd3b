"""Ask a literature service: at its rate, with bounded retries, and without ever showing a key.

An answer counts only when it could be read. One that says less than it should, or is no answer at all, is a fault like
a lost connection, and is asked for again within the same bounds.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import ssl
import time
import urllib.request
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import TypeVar
from urllib.parse import urlencode, urlsplit

import httpx

from verl.errors import ConfigError, RetrieverError
from verl.retrieval.rate_limit import SlidingWindow, Turn
from verl.retrieval.web_http import Secrets, check_base_url, shortened

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FORM = "application/x-www-form-urlencoded"


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """How a service is asked.

    Attributes:
        rate: requests in any second, retries included, over all `sharers`; what the service allows when None.
        sharers: processes that ask with the same key, or from the same address; each gets an equal part of the rate.
        travel_s: longest that a request is taken to travel. It is counted when its answer begins, or that long after
            it left if that is sooner: what matters is when the service sees it.
        concurrency: requests on their way at the same time.
        timeout_s: for one attempt, from connecting to the last byte.
        attempts: most requests for one answer.
        backoff_s: mean wait before the second attempt; it doubles with every further one.
        max_wait_s: most that is waited between two attempts. A service that asks for more (Retry-After) is not asked
            again before that time: until then every query gets an error at once.
        max_body_bytes: longest answer that is read.
    """

    rate: float | None = None
    sharers: int = 1
    travel_s: float = 0.25
    concurrency: int = 32
    timeout_s: float = 30.0
    attempts: int = 5
    backoff_s: float = 0.5
    max_wait_s: float = 30.0
    max_body_bytes: int = 32 * 1024 * 1024

    def __post_init__(self) -> None:
        for name in ("sharers", "concurrency", "attempts", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"service {name}={getattr(self, name)}; expected at least 1")
        for name in ("rate", "timeout_s"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"service {name}={value}; expected a positive number")
        for name in ("travel_s", "backoff_s", "max_wait_s"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"service {name}={getattr(self, name)}; expected 0 or more seconds")


@dataclass(frozen=True, slots=True)
class Request:
    """One request, without its key.

    Attributes:
        path: below the service's address.
        parameters: names and values as they are; encoding them is the transport's business.
        form: send them as the form of a POST instead of in the address.
    """

    path: str
    parameters: Mapping[str, str]
    form: bool = False


class Unusable(Exception):
    """There is no answer, or none that can be used; asking again may help."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Rejected(RetrieverError):
    """The service refuses the request; asking again cannot help.

    Attributes:
        status: of the answer.
        reason: what the service says, shortened.
    """

    def __init__(self, status: int, reason: str, advice: str) -> None:
        super().__init__(f"status {status}: {reason or 'no reason given'}{advice}")
        self.status = status
        self.reason = reason


class Service:
    """Asks one service; belongs to one event loop, in which calls may be concurrent.

    Attributes:
        requests: sent so far, retries included.
        retries: sent because the attempt before failed.
    """

    def __init__(
        self,
        base_url: str,
        rate: float,
        secrets: Secrets,
        config: ServiceConfig,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Prepare; nothing is connected yet.

        Args:
            rate: requests in any second that the service allows; the configured one stands in its place.
            clock: seconds since some moment, never going back.
            sleep: waits for about as many seconds of `clock`.

        Raises:
            ConfigError: `base_url` is no address to which keys may be sent.
        """
        check_base_url(base_url)
        self.requests = 0
        self.retries = 0
        self._base_url = base_url.rstrip("/")
        self._host = urlsplit(base_url).hostname
        self._secrets = secrets
        self._config = config
        self._clock = clock
        self._sleep = sleep
        self._limiter = SlidingWindow.per_second((config.rate or rate) / config.sharers, clock, sleep)
        self._slots = asyncio.Semaphore(config.concurrency)
        self._blocked_until = -math.inf
        self._jitter = random.Random()  # only spreads retries in time; no result depends on it
        self._loop: asyncio.AbstractEventLoop | None = None
        transport = _KeyedTransport(_network(base_url, config), secrets)
        self._http = httpx.AsyncClient(transport=transport, timeout=config.timeout_s)

    async def ask(self, request: Request, read: Callable[[str], T]) -> T:
        """Return what `read` makes of the answer.

        Args:
            read: raises `Unusable` for a text that is not the whole answer.

        Raises:
            Rejected: the service refuses the request.
            RetrieverError: no usable answer within the attempts.
        """
        self._check_loop()
        attempt = 1
        while True:
            try:
                return read(await self._attempt(request))
            except Unusable as cause:
                reason = self._secrets.removed_from(str(cause))
                if attempt == self._config.attempts or cause.retry_after_s > self._config.max_wait_s:
                    raise RetrieverError(f"{reason} ({attempt} attempts)") from None
                logger.warning("%s: %s; attempt %d follows", self._host, reason, attempt + 1)
                await self._sleep(self._wait_s(attempt))
                attempt += 1
                self.retries += 1

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    def _check_loop(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop not in (None, loop):
            raise RetrieverError("the search was used in another event loop before; open one for each loop")
        self._loop = loop

    def _wait_s(self, attempt: int) -> float:
        mean = min(self._config.backoff_s * 2 ** min(attempt - 1, 30), self._config.max_wait_s)
        return min(mean * self._jitter.uniform(0.5, 1.5), self._config.max_wait_s)

    async def _attempt(self, request: Request) -> str:
        self._check_blocked()
        async with self._slots, self._limiter.turn() as turn:
            self._check_blocked()
            self.requests += 1
            status, headers, body = await self._send(request, turn)
        try:
            text = self._secrets.removed_from(body.decode("utf-8"))
        except UnicodeDecodeError as error:
            text = ""
            if status == 200:
                raise Unusable(f"the answer is not UTF-8 at byte {error.start}") from None
        if status != 200:
            raise self._fault(status, headers, text)
        return text

    async def _send(self, request: Request, turn: Turn) -> tuple[int, httpx.Headers, bytes]:
        arrival = _Arrival(turn, self._config.travel_s, self._sleep)
        try:
            # httpx bounds each read; an answer that drips would come through that for ever.
            async with asyncio.timeout(self._config.timeout_s):
                response = await self._http.send(self._built(request, arrival), stream=True)
                try:
                    arrival.known()
                    body = await self._read(response)
                finally:
                    await response.aclose()
        except TimeoutError:
            raise Unusable(f"no answer within {self._config.timeout_s:g} s") from None
        except httpx.RequestError as error:
            raise Unusable(f"{type(error).__name__}: {error}".rstrip(": ")) from None
        finally:
            arrival.cancel()
        return response.status_code, response.headers, body

    def _built(self, request: Request, arrival: _Arrival) -> httpx.Request:
        extensions = {"trace": arrival.trace}
        address = self._base_url + request.path
        if request.form:
            return self._http.build_request("POST", address, data=dict(request.parameters), extensions=extensions)
        return self._http.build_request("GET", address, params=dict(request.parameters), extensions=extensions)

    async def _read(self, response: httpx.Response) -> bytes:
        limit, size = self._config.max_body_bytes, 0
        chunks: list[bytes] = []
        async for chunk in response.aiter_bytes():
            size += len(chunk)
            if size > limit:
                raise RetrieverError(f"the answer has more than max_body_bytes={limit}; ask for fewer documents")
            chunks.append(chunk)
        return b"".join(chunks)

    def _fault(self, status: int, headers: httpx.Headers, text: str) -> Exception:
        """Return what an answer with another status than 200 means."""
        reason = shortened(text)
        if status in (408, 425, 429) or status >= 500:
            retry_after_s = _retry_after_s(headers.get("Retry-After", ""))
            self._hold(retry_after_s)
            return Unusable(f"status {status}: {reason or 'no reason given'}", retry_after_s)
        # E-utilities say 400 of a wrong key.
        doubtful = status in (401, 403) or "api key" in reason.lower()
        advice = f"; check {' and '.join(self._secrets.variables) or 'whether the service admits you'}"
        return Rejected(status, reason, advice if doubtful else "")

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


class _Arrival:
    """Counts a request once: when it is known to have arrived, at the latest `travel_s` after it has left."""

    def __init__(self, turn: Turn, travel_s: float, sleep: Callable[[float], Awaitable[None]]) -> None:
        self._turn = turn
        self._travel_s = travel_s
        self._sleep = sleep
        self._waiting: asyncio.Task[None] | None = None
        self._counted = False

    async def trace(self, event: str, _: Mapping[str, object]) -> None:
        """Hear how far the request has come."""
        # A proxy is asked to connect first, which looks alike; the last request to leave is the one that counts.
        if event.endswith("send_request_body.complete"):
            self.cancel()
            self._waiting = asyncio.create_task(self._assume())

    def known(self) -> None:
        """Count, unless that is done."""
        if not self._counted:
            self._counted = True
            self._turn.sent()

    def cancel(self) -> None:
        """Assume nothing any more; the end of its turn counts a request that was not."""
        if self._waiting is not None:
            self._waiting.cancel()

    async def _assume(self) -> None:
        await self._sleep(self._travel_s)
        self.known()


class _KeyedTransport(httpx.AsyncBaseTransport):
    """Adds the keys below everything that logs or reports a request: to the form if there is one, else the address."""

    def __init__(self, inner: httpx.AsyncBaseTransport, secrets: Secrets) -> None:
        self._inner = inner
        self._keys = secrets.placed("query")

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await self._inner.handle_async_request(self._keyed(request) if self._keys else request)

    async def aclose(self) -> None:
        await self._inner.aclose()

    def _keyed(self, request: httpx.Request) -> httpx.Request:
        headers = [(name, value) for name, value in request.headers.multi_items() if name != "content-length"]
        if request.headers.get("Content-Type") == _FORM:
            body = request.content + b"&" + urlencode(self._keys).encode()
            return httpx.Request("POST", request.url, headers=headers, content=body, extensions=request.extensions)
        url = request.url.copy_merge_params(self._keys)
        return httpx.Request("GET", url, headers=headers, extensions=request.extensions)


def json_object(text: str) -> dict[str, object]:
    """Read an answer that is a JSON object.

    Raises:
        Unusable: it is none.
    """
    try:
        # A service that repeats a query may repeat its control characters as they are.
        answer = json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        start = shortened(text[:80]) or "nothing"
        raise Unusable(f"the answer is not JSON ({type(error).__name__}); it starts with: {start}") from None
    if not isinstance(answer, dict):
        raise Unusable(f"the answer is a JSON {type(answer).__name__}; expected an object")
    return answer


def _network(base_url: str, config: ServiceConfig) -> httpx.AsyncBaseTransport:
    """Return the way to the service, through the proxy that the environment names, if any."""
    parts = urlsplit(base_url)
    proxy = None
    if parts.scheme == "https" and not urllib.request.proxy_bypass(parts.hostname or ""):
        proxies = urllib.request.getproxies()
        proxy = proxies.get("https") or proxies.get("all")
    limits = httpx.Limits(max_connections=config.concurrency)
    try:
        return httpx.AsyncHTTPTransport(verify=_certificates(), proxy=proxy, limits=limits)
    except (ValueError, ImportError) as error:  # an address that is none, or a kind of proxy that needs a package
        raise ConfigError("the environment's proxy for the web cannot be used; expected http://HOST:PORT") from error


@cache
def _certificates() -> ssl.SSLContext:
    return httpx.create_ssl_context()  # takes a tenth of a second


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
