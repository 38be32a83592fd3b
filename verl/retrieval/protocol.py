"""HTTP connections that cannot be held open for nothing: uvicorn's protocol with deadlines and limits.

uvicorn bounds how long a connection may idle after an answer. Here a connection also has to send the head of a request
in time and in moderate size, to go on accepting its answer, and to give way when there are too many.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from verl.retrieval.server_config import ServerConfig

logger = logging.getLogger(__name__)

_MAX_HEAD_BYTES = 64 * 1024


class ConnectionGuard:
    """The limits of a server's connections, and those that wait for a request, the longest waiting first."""

    def __init__(self, config: ServerConfig) -> None:
        self.header_timeout_s = config.header_timeout_s
        self.write_timeout_s = config.write_timeout_s
        self.max_connections = config.max_connections
        self.idle: dict[GuardedProtocol, None] = {}

    def protocol(self) -> Callable[..., GuardedProtocol]:
        """Return what uvicorn calls for a new connection."""
        return partial(GuardedProtocol, self)


class GuardedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, guard: ConnectionGuard, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._guard = guard
        self._head_bytes = 0
        self._head_began = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start to wait for a request; where there are too many connections, the longest waiting one ends."""
        super().connection_made(transport)
        self._wait_for_head()
        if len(self.connections) > self._guard.max_connections:
            longest = next(iter(self._guard.idle))
            del self._guard.idle[longest]
            longest.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        self._guard.idle.pop(self, None)
        self._stop_waiting_for_head()
        self._stop_waiting_for_reader()

    def data_received(self, data: bytes) -> None:
        """Read on; bytes that come while no request is answered must soon make up a head."""
        super().data_received(data)
        if self.transport.is_closing() or (self.cycle is not None and not self.cycle.response_complete):
            return
        self._head_bytes += len(data)
        if self._head_bytes > _MAX_HEAD_BYTES:
            self.transport.abort()
        else:
            self._wait_for_head()

    def on_message_begin(self) -> None:
        """Note that a head has begun, perhaps while the request before is being answered."""
        self._head_began = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Stop waiting: whoever answers the request bounds the time of its body."""
        self._head_began = False
        self._stop_waiting_for_head()
        self._guard.idle.pop(self, None)
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """Wait for the next request: for the keep-alive time, or for its head if that has begun."""
        super().on_response_complete()
        self._head_bytes = 0
        if self._head_began and not self.transport.is_closing():
            self._wait_for_head()
        elif self.timeout_keep_alive_task is not None:  # else the next request is being answered already
            self._guard.idle[self] = None

    def pause_writing(self) -> None:
        """The client takes its answer more slowly than it is sent."""
        super().pause_writing()
        self._wait_for_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """The client has taken nearly all of its answer."""
        super().resume_writing()
        self._stop_waiting_for_reader()

    def _wait_for_head(self) -> None:
        self._guard.idle[self] = None
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self._guard.header_timeout_s, self.transport.close)

    def _stop_waiting_for_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _wait_for_reader(self, unsent: int) -> None:
        self._write_timer = self.loop.call_later(self._guard.write_timeout_s, self._check_reader, unsent)

    def _check_reader(self, unsent_before: int) -> None:
        unsent = self.transport.get_write_buffer_size()
        if unsent >= unsent_before:
            logger.warning("a client took nothing of its answer for %g s; disconnected", self._guard.write_timeout_s)
            self.transport.abort()
        else:
            self._wait_for_reader(unsent)

    def _stop_waiting_for_reader(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
