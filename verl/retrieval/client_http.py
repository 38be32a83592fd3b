"""One request of the retriever's contract over HTTP: what comes back is results, or says whose fault it is."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

from verl.errors import RetrieverError
from verl.retrieval.auth import token_from
from verl.retrieval.client_config import RetrieverClientConfig
from verl.retrieval.client_endpoints import Unavailable
from verl.retrieval.wire import RetrieveRequest, parse_response, request_body
from verl.types import SearchResult

_BUSY = 503
_GATEWAY = (502, 504)
_IDENTIFY_TIMEOUT_S = 5.0


class Failed(RetrieverError):
    """The service answered, and will not do better: asking the same again cannot help, or would hide a fault.

    Attributes:
        what: which service did what.
        queries: the queries at fault by their position, each with the reason; empty when all are.
    """

    def __init__(self, what: str, reason: str, queries: Mapping[int, str]) -> None:
        super().__init__(f"{what}: {reason}")
        self.what = what
        self.queries = queries


class HttpRetriever:
    """Sends single requests, without retries."""

    def __init__(self, config: RetrieverClientConfig, transport: httpx.AsyncBaseTransport | None) -> None:
        """Prepare; nothing is connected yet.

        Raises:
            ConfigError: the variable with the token is not set.
        """
        self._timeout_s = config.timeout_s
        self._ids_only = config.ids_only
        token = token_from(config.token_env)
        self._http = httpx.AsyncClient(
            transport=transport,
            timeout=config.timeout_s,
            limits=httpx.Limits(max_connections=config.max_requests),
            headers={"Authorization": f"Bearer {token}"} if token else None,
            # A proxy from the environment would be asked for a service that usually runs on this very machine.
            trust_env=False,
        )

    async def search(self, url: str, queries: Sequence[str], topk: int) -> list[SearchResult]:
        """Return one result per query.

        Raises:
            Unavailable: there was no connection or no answer, or status 503; also 502 and 504 that name no query,
                which is how a proxy says that it got no connection or no answer.
            Failed: any other status: the service refuses the request, failed, or cannot answer some of its queries. A
                proxy's 429 is one of them: asking again would add to what it bounds; lower `max_requests`.
            RetrieverError: the answer breaks the contract.
        """
        body = request_body(RetrieveRequest(tuple(queries), topk, True, self._ids_only))
        response = await self._send("POST", url, self._timeout_s, body)
        if response.status_code != 200:
            raise _failure(url, response, len(queries))
        try:
            return parse_response(response.content, queries, topk, self._ids_only)
        except RetrieverError as error:
            raise RetrieverError(f"retriever {url}: {error}; check that the URL is a retriever's") from error

    async def identify(self, url: str) -> str | None:
        """Return the fingerprint of what an endpoint serves, None if it is a server that does not say.

        Raises:
            Unavailable: as above.
            Failed: it refuses to say.
        """
        for path in ("info", "health"):
            address = f"{url.rstrip('/').rpartition('/')[0]}/{path}"
            response = await self._send("GET", address, min(self._timeout_s, _IDENTIFY_TIMEOUT_S))
            if response.status_code in (404, 405):
                continue
            if response.status_code != 200:
                raise _failure(url, response, 0)
            try:
                known = json.loads(response.content)
            except ValueError:
                continue
            if isinstance(known, dict) and isinstance(known.get("fingerprint"), str):
                return known["fingerprint"]
        return None

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _send(self, method: str, url: str, timeout_s: float, body: bytes | None = None) -> httpx.Response:
        headers = {"Content-Type": "application/json"} if body is not None else None
        try:
            # httpx bounds each read; an answer that drips would come through that for ever.
            async with asyncio.timeout(timeout_s):
                return await self._http.request(method, url, content=body, headers=headers)
        except TimeoutError as error:
            raise Unavailable(f"no answer within timeout_s={timeout_s:g}") from error
        except httpx.TransportError as error:
            raise Unavailable(f"{type(error).__name__}: {error}".rstrip(": ")) from error


def _failure(url: str, response: httpx.Response, queries: int) -> Unavailable | Failed:
    message, at_fault = _reason(response, queries)
    status = response.status_code
    if status == _BUSY or (status in _GATEWAY and not at_fault):  # without a query, a proxy speaks, not the service
        return Unavailable(f"status {status}: {message}", _retry_after_s(response))
    if status in _GATEWAY:
        return Failed(f"retriever {url} could not answer", message, at_fault)
    did = "failed" if status >= 500 else "refused the request"
    return Failed(f"retriever {url} {did} with {status}", message, at_fault)


def _reason(response: httpx.Response, queries: int) -> tuple[str, dict[int, str]]:
    """Return the message of an error answer, ours or another server's, and which queries are at fault, if it says."""
    try:
        error = json.loads(response.content)["error"]
        message = str(error["message"])
        listed = error.get("query_errors") or [{"query_index": error.get("query_index"), "message": message}]
        pairs = [(item["query_index"], str(item["message"])) for item in listed]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return response.text.strip()[:300] or response.reason_phrase, {}
    return message, {at: reason for at, reason in pairs if type(at) is int and 0 <= at < queries}


def _retry_after_s(response: httpx.Response) -> float:
    """Return the seconds of a Retry-After header, which may also be a date; 0 without one."""
    value = response.headers.get("Retry-After", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0
