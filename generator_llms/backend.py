"""What a backend is, and how the answers of HTTP are sorted into those worth another try and others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

from generator_llms.replies import Completion, ServedModel, shorten
from generator_llms.request import Request
from generator_llms.retry import Rejected, Unavailable, parse_retry_after

_RETRIED_STATUS = (408, 409, 425, 429)


class Wire(Protocol):
    """Carries JSON to one endpoint and bytes back; `where` is its address, for messages."""

    where: str

    async def post(self, path: str, body: Mapping[str, Any]) -> bytes:
        """Send `body` and return the body of a reply of status 200.

        Args:
            path: under the endpoint's base URL, or an address of its own.

        Raises:
            Unavailable: no answer, or one that says to come back later.
            Rejected: an answer that says no.
        """
        ...

    async def get(self, path: str) -> bytes:
        """Return what lies at `path`; raises as `post`."""
        ...

    async def aclose(self) -> None:
        """Close all connections."""
        ...


class Backend(Protocol):
    """One endpoint, asked in its own protocol; `where` is its address, for messages."""

    where: str

    async def complete(self, request: Request) -> Completion:
        """Return the reply.

        Raises:
            Unavailable, Malformed, Rejected: see `generator_llms.retry`.
            ConfigError: the backend has no such kind of request.
        """
        ...

    async def models(self) -> list[ServedModel] | None:
        """Return what is served, at least one model; None where the endpoint cannot be asked. Raises as `complete`."""
        ...

    async def aclose(self) -> None:
        """Close all connections."""
        ...


def failure(status: int, body: bytes, retry_after: str | None, secret: str) -> Unavailable | Rejected:
    """Return what a status other than 200 means.

    Args:
        secret: the key, which some endpoints repeat in their messages; it is taken out.
    """
    said = error_text(body)
    text = f"status {status}: {shorten(said.replace(secret, '***') if secret else said)}"
    if status in _RETRIED_STATUS or status >= 500:
        return Unavailable(text, parse_retry_after(retry_after))
    if 300 <= status < 400:
        return Rejected(f"{text}; it redirects to another address, put that one into base_url")
    return Rejected(f"{text}; correct the configuration or the request")


def error_text(body: bytes) -> str:
    """Return the message in an error's body: JSON of the usual shapes, else the body itself."""
    text = body.decode("utf-8", errors="replace")
    try:
        payload = json.loads(text)
    except (ValueError, RecursionError):
        return text
    error = payload.get("error", payload) if isinstance(payload, Mapping) else payload
    message = error.get("message") if isinstance(error, Mapping) else error
    return message if isinstance(message, str) else text
