"""Read the bodies of requests within bounds of size, time and memory."""

from __future__ import annotations

import asyncio

from starlette.types import Message, Receive

from verl.retrieval.server_config import MEGABYTE, ServerConfig
from verl.retrieval.wire import RefusedRequest


class BodyReader:
    """Reads bodies, giving up as soon as one is too long or too slow, whatever its headers promise."""

    def __init__(self, config: ServerConfig) -> None:
        self._timeout_s = config.body_timeout_s
        self._max_bytes = config.limits.max_body_bytes
        self._max_held_bytes = config.max_body_mb * MEGABYTE
        self._held_bytes = 0

    async def read(self, receive: Receive) -> bytes:
        """Return the body.

        Raises:
            RefusedRequest: it is too long (413) or too slow (408), all bodies together are too long (503), or the
                client left.
        """
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._timeout_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise RefusedRequest(400, "disconnected", "the connection closed before the body was complete")
                    chunk, more = message.get("body", b""), message.get("more_body", False)
                    chunks.append(chunk)
                    size += len(chunk)
                    self._held_bytes += len(chunk)
                    self._check(size)
        except TimeoutError as error:
            message = f"the body did not arrive within {self._timeout_s:g} s; send it at once"
            raise RefusedRequest(408, "body_timeout", message) from error
        finally:
            self._held_bytes -= size
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _check(self, size: int) -> None:
        if size > self._max_bytes:
            message = f"the body has more than {self._max_bytes} bytes; send fewer queries in a request"
            raise RefusedRequest(413, "body_too_large", message)
        if self._held_bytes > self._max_held_bytes:
            message = f"the bodies on their way hold more than {self._max_held_bytes} bytes together; ask again later"
            raise RefusedRequest(503, "overloaded", message, retry_after_s=1)


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body which was read before, and then goes on with the connection."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return left.pop() if left else await receive()

    return again
